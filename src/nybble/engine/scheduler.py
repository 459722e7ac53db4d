"""Decides, step by step, which sequences go through the model, each with how many tokens.

There is no prefill or decode phase: each sequence has a number of computed tokens that catches up with its tokens.
Chunked prefill, prefix hits and preemption are that one rule. Sequences that need one token go first, so that a long
prompt never stops an answer that is being read; prompts get what is left of the step's budget.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from nybble.cache.block_pool import BLOCK_SIZE, BlockPool
from nybble.engine.kept_prefixes import KeptPrefixes
from nybble.engine.request import Sequence

Scheduled = list[tuple[Sequence, int]]

# Tokens of prompts in a step that other sequences wait for: it bounds the time between two of their tokens.
PREFILL_BESIDE_DECODE = 256
_RESTORED_AT_ONCE = 32  # blocks that come back from a file, for a moment twice in memory


def blocks_for(num_tokens: int) -> int:
    """How many cache blocks hold so many tokens."""
    return -(-num_tokens // BLOCK_SIZE)


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return (*sequence.request.order, sequence.index)


class Scheduler:
    """The waiting and the running sequences, and the blocks of the latter."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_blocks_per_seq: int,
        enable_prefix_caching: bool,
        kept: KeptPrefixes | None = None,
        prefill_beside_decode: int = PREFILL_BESIDE_DECODE,
    ) -> None:
        self.pool = pool
        self.waiting: list[Sequence] = []  # both in the order in which they are served
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.prefix_queries = 0  # prompt tokens that were looked for in the prefix cache
        self.prefix_hits = 0
        self.restored_blocks = 0  # that came back from a file
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._beside_decode = prefill_beside_decode
        self._prefix_caching = enable_prefix_caching
        self._kept = kept
        self._to_fork = 0  # samples that will run as soon as their prompt has been read
        self._step = 0
        self._tables = np.zeros((max_num_seqs, max_blocks_per_seq), np.int32)
        self._slots = list(range(max_num_seqs - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        insort(self.waiting, sequence, key=_order)

    def block_tables(self, sequences: Iterable[Sequence]) -> npt.NDArray[np.int32]:
        """One row for each sequence; entries past its blocks mean nothing."""
        rows = list(sequences)
        width = max(len(sequence.blocks) for sequence in rows)
        return self._tables[[sequence.slot for sequence in rows], :width]

    def schedule(self) -> Scheduled:
        """What the next step computes. Empty only if nothing runs or waits."""
        while True:
            self._step += 1
            self._make_way()
            scheduled: Scheduled = []
            budget = self._schedule_decodes(scheduled, self._budget)
            if scheduled:
                budget = min(budget, self._beside_decode)
            budget = self._schedule_prompts(scheduled, budget)
            self._admit(scheduled, budget)
            if scheduled or not self.running:
                return scheduled
            # Prompts that are half read hold all the blocks: the last in order makes room for the others.
            self.preempt(self.running[-1])

    def _schedule_decodes(self, scheduled: Scheduled, budget: int) -> int:
        for sequence in list(self.running):
            if sequence.slot >= 0 and sequence.num_missing_tokens == 1 and budget > 0 and self._make_room(sequence):
                self._choose(scheduled, sequence, 1)
                budget -= 1
        return budget

    def _schedule_prompts(self, scheduled: Scheduled, budget: int) -> int:
        for sequence in self.running:
            if sequence.num_missing_tokens > 1 and budget > 0:
                budget -= self._schedule_chunk(scheduled, sequence, budget)
        return budget

    def _schedule_chunk(self, scheduled: Scheduled, sequence: Sequence, budget: int) -> int:
        room = (len(sequence.blocks) + self.pool.num_free) * BLOCK_SIZE - sequence.num_computed_tokens
        num_tokens = min(sequence.num_missing_tokens, budget, room)
        if num_tokens <= 0:
            return 0
        self._grow(sequence, sequence.num_computed_tokens + num_tokens)
        self._choose(scheduled, sequence, num_tokens)
        return num_tokens

    def _choose(self, scheduled: Scheduled, sequence: Sequence, num_tokens: int) -> None:
        sequence.scheduled_in = self._step
        scheduled.append((sequence, num_tokens))

    def _make_room(self, sequence: Sequence) -> bool:
        """Blocks for one more token, if need be at the cost of sequences that come later; of itself if none does."""
        while blocks_for(sequence.num_computed_tokens + 1) > len(sequence.blocks) and self.pool.num_free == 0:
            victim = self.running[-1]
            if victim.scheduled_in == self._step:  # it is the last that runs, and this one comes after it
                victim = sequence
            self.preempt(victim)
            if victim is sequence:
                return False
        self._grow(sequence, sequence.num_computed_tokens + 1)
        return True

    def _grow(self, sequence: Sequence, num_tokens: int) -> None:
        have, needed = len(sequence.blocks), blocks_for(num_tokens)
        if needed > have:
            sequence.blocks += self.pool.allocate(needed - have)
            self._tables[sequence.slot, have:needed] = sequence.blocks[have:]

    def make_room_for_guesses(self, sequence: Sequence, count: int) -> int:
        """Blocks for guesses behind the token of a scheduled sequence; for how many of them there are."""
        have = (len(sequence.blocks) + self.pool.num_free) * BLOCK_SIZE - sequence.num_computed_tokens - 1
        count = max(min(count, have), 0)
        self._grow(sequence, sequence.num_computed_tokens + 1 + count)
        return count

    def drop_guesses(self, sequence: Sequence) -> None:
        """Give the blocks back that only guesses needed."""
        needed = blocks_for(len(sequence.token_ids))
        if sequence.slot >= 0 and len(sequence.blocks) > needed:
            self.pool.free(sequence.blocks[needed:])
            del sequence.blocks[needed:]

    def _make_way(self) -> None:
        """Sequences of lower priority stop where the next one in order does not fit beside them."""
        while self.waiting and self.running:
            first, last = self.waiting[0], self.running[-1]
            if last.request.priority <= first.request.priority or self._fits(first, self._find_prefix(first)):
                return
            self.preempt(last)

    def _admit(self, scheduled: Scheduled, budget: int) -> None:
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            hits = self._find_prefix(sequence)
            if not self._fits(sequence, hits):
                return
            del self.waiting[0]
            self._start(sequence, hits)
            self._to_fork += self._followers(sequence)
            budget -= self._schedule_chunk(scheduled, sequence, budget)

    @staticmethod
    def _followers(sequence: Sequence) -> int:
        """How many other samples will run on its prompt."""
        return 0 if sequence.request.is_forked else len(sequence.request.sequences) - 1

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks of the cache that hold the beginning of the sequence."""
        hits = []
        for index in range(self._num_shareable(sequence)):
            block = self.pool.lookup(sequence.hash_of_block(index))
            if block is None:
                break
            hits.append(block)
        return hits

    def _num_shareable(self, sequence: Sequence) -> int:
        """How many of its blocks need not be computed. The last token always runs: its logits are wanted."""
        if not self._prefix_caching or sequence.request.wants_all_hidden:
            return 0
        return (len(sequence.token_ids) - 1) // BLOCK_SIZE

    def _restore(self, sequence: Sequence, blocks: list[int], kept: KeptPrefixes) -> None:
        """Go on behind the blocks that hold its beginning with what the file has, or still the cache further on."""
        last = self._num_shareable(sequence)
        while len(blocks) < last:
            known = self.pool.lookup(sequence.hash_of_block(len(blocks)))
            if known is not None:
                self.pool.take(known)
                blocks.append(known)
                continue
            wanted: list[bytes] = []
            for index in range(len(blocks), min(last, len(blocks) + min(self.pool.num_free, _RESTORED_AT_ONCE))):
                content = sequence.hash_of_block(index)
                if content not in kept or self.pool.lookup(content) is not None:
                    break
                wanted.append(content)
            if not wanted:
                return
            taken = self.pool.allocate(len(wanted))
            count = kept.load(wanted, taken)
            for block, content in zip(taken[:count], wanted, strict=False):
                self.pool.publish(block, content)
            self.pool.free(taken[count:])
            blocks += taken[:count]
            self.restored_blocks += count
            if count < len(wanted):
                return

    def _fits(self, sequence: Sequence, hits: list[int]) -> bool:
        """Whether it, with all of its tokens, has room beside what runs."""
        if not self.running:
            return True
        if len(self.running) + self._to_fork + 1 + self._followers(sequence) > self._max_num_seqs:
            return False
        idle_hits = sum(self.pool.is_idle(block) for block in hits)
        needed = blocks_for(len(sequence.token_ids)) - len(hits) + idle_hits
        return needed < self.pool.num_free  # with one to spare, or the next token of another one would preempt it

    def _start(self, sequence: Sequence, hits: list[int]) -> None:
        for block in hits:
            self.pool.take(block)
        if self._kept is not None:
            self._restore(sequence, hits, self._kept)
        sequence.blocks = hits
        sequence.num_published = len(hits)
        sequence.num_computed_tokens = len(hits) * BLOCK_SIZE
        request = sequence.request
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(sequence.num_computed_tokens, len(request.prompt_token_ids))
            if self._prefix_caching:
                self.prefix_queries += len(request.prompt_token_ids)
                self.prefix_hits += request.num_cached_tokens
        self._run(sequence)

    def _run(self, sequence: Sequence) -> None:
        sequence.slot = self._slots.pop()
        self._tables[sequence.slot, : len(sequence.blocks)] = sequence.blocks
        insort(self.running, sequence, key=_order)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks away; it will be computed again, from what the prefix cache still has."""
        self._stop(sequence)
        sequence.num_computed_tokens = 0
        sequence.num_published = 0
        self.num_preemptions += 1
        sequence.request.metrics.num_preemptions += 1
        self._to_fork -= self._followers(sequence)
        self.add(sequence)

    def computed(self, scheduled: Scheduled) -> None:
        """The step was executed: its tokens are in the cache, and blocks that became full can be shared."""
        for sequence, num_tokens in scheduled:
            sequence.num_computed_tokens += num_tokens
            if self._prefix_caching:
                for index in range(sequence.num_published, sequence.num_computed_tokens // BLOCK_SIZE):
                    self.pool.publish(sequence.blocks[index], sequence.hash_of_block(index))
                    sequence.num_published = index + 1

    def fork(self, leader: Sequence, followers: list[Sequence]) -> list[tuple[int, int]]:
        """Let the other samples of a prompt run on the blocks of the first; the copies of blocks that this needs.

        Full blocks are shared. The last one, which every sample goes on to write, is copied. A sample for which no
        block is left waits instead.
        """
        self._to_fork -= len(followers)
        leader.request.is_forked = True
        copies = []
        for follower in followers:
            if follower.finish_reason is not None:
                continue
            shared = leader.blocks[: leader.num_computed_tokens // BLOCK_SIZE]
            partial = len(leader.blocks) > len(shared)
            if not self._slots or (partial and self.pool.num_free == 0):
                self.add(follower)
                continue
            for block in shared:
                self.pool.take(block)
            follower.blocks = list(shared)
            if partial:
                follower.blocks += self.pool.allocate(1)
                copies.append((leader.blocks[len(shared)], follower.blocks[-1]))
            follower.num_computed_tokens = leader.num_computed_tokens
            follower.num_published = len(shared)
            follower.hashes = leader.hashes[: len(shared)]
            self._run(follower)
        return copies

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended: its blocks are free at once."""
        if sequence.slot >= 0:
            self._stop(sequence)
            self._to_fork -= self._followers(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        if self._kept is not None:
            self._kept.note(sequence.hashes[: sequence.num_published])
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        self._slots.append(sequence.slot)
        sequence.slot = -1

    @property
    def waste(self) -> float:
        """The share of the running sequences' memory that holds no token. A shared block counts once."""
        used = self.pool.num_used
        # Not num_computed_tokens: in the middle of a step that would count what the step is about to fill.
        empty = sum(max(len(s.blocks) * BLOCK_SIZE - len(s.token_ids), 0) for s in self.running)
        return empty / (used * BLOCK_SIZE) if used else 0.0
