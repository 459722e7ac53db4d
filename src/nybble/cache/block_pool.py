"""Hands out the blocks of a paged KV cache and takes them back."""

from __future__ import annotations

from collections.abc import Iterable

BLOCK_SIZE = 16  # tokens in a block; the native kernels are written for this size


class BlockPool:
    """Free and used block ids. Freed blocks are used again first, while their memory is still in a CPU cache."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a block pool needs at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes first
        self._used = [False] * num_blocks

    @property
    def num_free(self) -> int:
        """How many blocks can still be allocated."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks out of the pool.

        Raises:
            MemoryError: fewer blocks are free; ask `num_free` first. Nothing is taken then.
        """
        if count < 0:
            raise ValueError(f"cannot allocate {count} blocks")
        if count > len(self._free):
            raise MemoryError(f"{count} cache blocks were asked for, {len(self._free)} of {self.num_blocks} are free")
        ids = [self._free.pop() for _ in range(count)]
        for block in ids:
            self._used[block] = True
        return ids

    def free(self, ids: Iterable[int]) -> None:
        """Give blocks back; the pool is unchanged if one of them is not in use.

        Raises:
            ValueError: an id is unknown, already free, or given twice.
        """
        ids = list(ids)
        if len(set(ids)) != len(ids):
            raise ValueError(f"a block is given back twice: {ids}")
        for block in ids:
            if not 0 <= block < self.num_blocks or not self._used[block]:
                raise ValueError(f"block {block} is given back, but it is not in use")
        for block in reversed(ids):
            self._used[block] = False
            self._free.append(block)

    def check_integrity(self) -> None:
        """For tests: every block is either free, once, or used.

        Raises:
            AssertionError: it is not so.
        """
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a block is in the free list twice")
        for block, used in enumerate(self._used):
            if used == (block in free):
                raise AssertionError(f"block {block} is {'both used and free' if used else 'neither used nor free'}")
