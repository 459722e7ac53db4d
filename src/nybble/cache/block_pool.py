"""Hands out the blocks of a paged KV cache, shares them, and remembers what full ones hold.

A full block is known by a hash of its tokens and of all that came before them, so that equal prefixes share memory. A
block that nobody uses keeps its content until it is needed: blocks without a known content are taken first, then the
one that was given back longest ago.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BLOCK_SIZE = 16  # tokens in a block; the native kernels are written for this size


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """What a block is known by: 16 bytes of BLAKE2b over the hash of the block before it and its own tokens."""
    return hashlib.blake2b(parent + array("i", token_ids).tobytes(), digest_size=16).digest()


def root_hash(salt: str | None, weights: str = "") -> bytes:
    """The parent of a first block. Requests with different salts, or weights, never share blocks.

    weights: at most 64 characters of ASCII that tell adapters apart.
    """
    return hashlib.blake2b((salt or "").encode(), digest_size=16, key=weights.encode("ascii")).digest()


class BlockPool:
    """Block ids with their reference counts, and the prefix cache."""

    def __init__(self, num_blocks: int, block_size: int = BLOCK_SIZE) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a block pool needs at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 goes first
        self._idle: OrderedDict[int, None] = OrderedDict()  # unused blocks with a known content, oldest first
        self._references = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """How many blocks can still be allocated."""
        return len(self._blank) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def references(self, block: int) -> int:
        """How many sequences use the block."""
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks out of the pool; what idle ones held may be forgotten.

        Raises:
            MemoryError: fewer blocks are free; ask `num_free` first. Nothing is taken then.
        """
        if count < 0:
            raise ValueError(f"cannot allocate {count} blocks")
        if count > self.num_free:
            raise MemoryError(f"{count} cache blocks were asked for, {self.num_free} of {self.num_blocks} are free")
        ids = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._block_of[self._hash_of.pop(block)]
            self._references[block] = 1
            ids.append(block)
        return ids

    def lookup(self, content: bytes) -> int | None:
        """The block with this content, used or idle."""
        return self._block_of.get(content)

    def is_idle(self, block: int) -> bool:
        """Whether nobody uses the block: taking it makes one block less free."""
        return self._references[block] == 0

    def take(self, block: int) -> None:
        """Use a block that `lookup` found, or that another sequence uses, once more.

        Raises:
            ValueError: it holds nothing.
        """
        if self._references[block] == 0:
            if block not in self._idle:
                raise ValueError(f"block {block} is taken, but it holds nothing")
            del self._idle[block]
        self._references[block] += 1

    def publish(self, block: int, content: bytes) -> None:
        """Say what a used block holds, now that it is full. If another block holds the same, that one stays known."""
        if content not in self._block_of and block not in self._hash_of:
            self._block_of[content] = block
            self._hash_of[block] = content

    def free(self, ids: Iterable[int]) -> None:
        """Give blocks back, in the order of the sequence; the pool is unchanged if one of them is not in use.

        Raises:
            ValueError: an id is unknown, already free, or given twice.
        """
        ids = list(ids)
        if len(set(ids)) != len(ids):
            raise ValueError(f"a block is given back twice: {ids}")
        for block in ids:
            if not 0 <= block < self.num_blocks or self._references[block] == 0:
                raise ValueError(f"block {block} is given back, but it is not in use")
        for block in reversed(ids):  # the end of a sequence is of less use to others than its beginning
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._idle[block] = None
                else:
                    self._blank.append(block)

    def forget(self) -> None:
        """Empty the prefix cache; blocks in use stay where they are."""
        self._blank.extend(self._idle)
        self._idle.clear()
        self._hash_of.clear()
        self._block_of.clear()

    def check_integrity(self) -> None:
        """Every block is exactly one of blank, idle and used, and the two maps of contents agree.

        Raises:
            AssertionError: it is not so.
        """
        blank = set(self._blank)
        if len(blank) != len(self._blank):
            raise AssertionError("a block is in the free list twice")
        for block, references in enumerate(self._references):
            places = (block in blank) + (block in self._idle) + (references > 0)
            if references < 0 or places != 1:
                raise AssertionError(f"block {block} has {references} references and is in {places} places, not in one")
        if {v: k for k, v in self._hash_of.items()} != self._block_of:
            raise AssertionError("the contents of blocks are recorded in two ways that differ")
        if not set(self._idle) <= set(self._hash_of) or blank & set(self._hash_of):
            raise AssertionError("an idle block has no content, or a blank one has")
