"""The loop that turns prompts into tokens: many sequences, ragged steps, chunked prefill.

There is no prefill or decode phase: each sequence has a number of computed tokens that catches up with its tokens. A
step first takes the sequences that need one token, then fills what is left of the token budget with pieces of prompts.
It knows nothing of files, chats or the command line.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Sequence as AnySequence

import numpy as np

from nybble.backends.cpu import Sampled, SampleRow, Step
from nybble.cache.block_pool import BLOCK_SIZE, BlockPool
from nybble.core.errors import ConfigError, PromptError
from nybble.core.sampling import SamplingParams
from nybble.engine.model import Model, Tokenizer
from nybble.engine.sequence import KeptPrefix, Sequence, Steps, TokenEvent
from nybble.engine.text import TextStream

PREFILL_TOKENS = 512  # of prompts in one step


def blocks_for(num_tokens: int) -> int:
    """How many cache blocks hold so many tokens."""
    return -(-num_tokens // BLOCK_SIZE)


class Generator:
    """Generates for many prompts at once on one model.

    A sequence reserves the blocks of its longest possible self before it starts, so a running sequence never has to
    stop for want of memory; those that do not fit yet wait their turn.

    Raises:
        ConfigError: the context or the cache has no room for a single token.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None = None,
        *,
        context: int,
        eos_token_ids: frozenset[int] = frozenset(),
        num_blocks: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        if context < 1:
            raise ConfigError(f"the context must hold at least one token, not {context}")
        if prefill_tokens < 1:
            raise ConfigError(f"a prefill chunk must have at least one token, not {prefill_tokens}")
        self.context = context
        self._model = model
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._prefill_tokens = prefill_tokens
        self._num_blocks = num_blocks if num_blocks is not None else blocks_for(context)
        self._pool = BlockPool(self._num_blocks)
        model.new_cache(self._num_blocks)

    def generate(
        self,
        prompts: AnySequence[AnySequence[int]],
        params: SamplingParams | AnySequence[SamplingParams],
        *,
        keep: KeptPrefix | None = None,
    ) -> Steps:
        """The events of each step, for all sequences that got a token in it; none while prompts are still read.

        The caller may stop iterating (or close the iterator) at any time: all blocks go back to the pool. With `keep`,
        which goes with a single prompt, the keys and values of the sequence stay for a later call instead, and those
        that an earlier call left are used as far as the prompt begins with their tokens.

        Raises:
            PromptError: a prompt is empty, or longer than the context. It is raised before anything runs.
            ConfigError: there is not one SamplingParams for each prompt, or `keep` with more than one prompt.
        """
        rows = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(rows) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts came with {len(rows)} sets of sampling parameters")
        if keep is not None and len(prompts) != 1:
            raise ConfigError("a kept prefix goes with exactly one prompt")
        pairs = zip(prompts, rows, strict=True)
        waiting = deque(self._sequence(index, prompt, row) for index, (prompt, row) in enumerate(pairs))
        if keep is not None:
            waiting[0].kept = keep
        return self._run(waiting)

    def drop(self, kept: KeptPrefix) -> None:
        """Give the blocks of a kept prefix back."""
        self._pool.free(kept.blocks)
        kept.blocks, kept.token_ids = [], []

    def _sequence(self, index: int, prompt: AnySequence[int], params: SamplingParams) -> Sequence:
        if not prompt:
            raise PromptError("the prompt is empty: give at least one token")
        if len(prompt) >= self.context:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.context}, which leaves no room "
                "for an answer: shorten the prompt or ask for a larger context"
            )
        longest = self.context if params.max_tokens is None else len(prompt) + params.max_tokens
        total = min(longest, self.context)
        if blocks_for(total) > self._num_blocks:
            raise PromptError(
                f"{len(prompt)} prompt tokens and up to {total - len(prompt)} new ones need {blocks_for(total)} cache "
                f"blocks, there are {self._num_blocks}: shorten the prompt or lower max_tokens"
            )
        return Sequence(
            index=index,
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            max_total_tokens=total,
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            text=TextStream(self._tokenizer.stream() if self._tokenizer else None, params.stop),
        )

    def _run(self, waiting: deque[Sequence]) -> Steps:
        running: list[Sequence] = []
        try:
            if waiting and waiting[0].kept is not None:
                self._take_prefix(waiting[0], waiting[0].kept)
            while waiting or running:
                self._admit(waiting, running)
                events = self._step(self._schedule(running))
                for sequence in [s for s in running if s.finish_reason is not None]:
                    running.remove(sequence)
                    self._release(sequence)
                yield events
        finally:
            for sequence in (*running, *waiting):
                self._release(sequence)

    def _admit(self, waiting: deque[Sequence], running: list[Sequence]) -> None:
        while waiting:
            sequence = waiting[0]
            missing = blocks_for(sequence.max_total_tokens) - len(sequence.blocks)
            if missing > self._pool.num_free:
                break
            sequence.blocks += self._pool.allocate(missing)
            running.append(waiting.popleft())
        if not running:
            raise PromptError("the cache has no free blocks for this prompt: drop a kept prefix first")

    def _take_prefix(self, sequence: Sequence, kept: KeptPrefix) -> None:
        common = 0
        # The last prompt token always runs, because its logits are what the first new token is drawn from.
        for ours, theirs in zip(sequence.token_ids[:-1], kept.token_ids, strict=False):
            if ours != theirs:
                break
            common += 1
        needed = blocks_for(sequence.max_total_tokens)
        self._pool.free(kept.blocks[needed:])
        sequence.blocks, sequence.num_computed_tokens = kept.blocks[:needed], common
        kept.blocks, kept.token_ids = [], []

    def _release(self, sequence: Sequence) -> None:
        if sequence.kept is None:
            self._pool.free(sequence.blocks)
        else:
            computed = sequence.num_computed_tokens
            used = blocks_for(computed)
            self._pool.free(sequence.blocks[used:])
            sequence.kept.blocks, sequence.kept.token_ids = sequence.blocks[:used], sequence.token_ids[:computed]
        sequence.blocks = []

    def _schedule(self, running: list[Sequence]) -> list[tuple[Sequence, int]]:
        """Which sequences go into the next step, each with how many tokens."""
        scheduled = [(s, 1) for s in running if s.num_missing_tokens == 1]
        budget = self._prefill_tokens
        for sequence in running:
            if sequence.num_missing_tokens > 1 and budget > 0:
                num_tokens = min(sequence.num_missing_tokens, budget)
                scheduled.append((sequence, num_tokens))
                budget -= num_tokens
        return scheduled

    def _step(self, scheduled: list[tuple[Sequence, int]]) -> list[TokenEvent]:
        step, drawing = _build_step(scheduled)
        logits = self._model.execute(step)
        for sequence, num_tokens in scheduled:
            sequence.num_computed_tokens += num_tokens
        if not drawing:
            return []
        drawn = self._model.sample(logits, [_sample_row(sequence) for sequence in drawing])
        return [self._accept(sequence, sampled) for sequence, sampled in zip(drawing, drawn, strict=True)]

    def _accept(self, sequence: Sequence, sampled: Sampled) -> TokenEvent:
        token_id = sampled.token_id
        sequence.token_ids.append(token_id)
        is_eos = token_id in self._eos_token_ids and not sequence.params.ignore_eos
        text = "" if is_eos else sequence.text.push(token_id)
        if is_eos or sequence.text.stopped:
            sequence.finish_reason = "stop"
        elif len(sequence.token_ids) >= sequence.max_total_tokens:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            text += sequence.text.flush()
        wants_logprobs = sequence.params.logprobs is not None
        return TokenEvent(
            index=sequence.index,
            token_id=token_id,
            text=text,
            finish_reason=sequence.finish_reason,
            logprob=sampled.logprob if wants_logprobs else None,
            top_logprobs=tuple(sampled.top_logprobs) if wants_logprobs else (),
        )


def _build_step(scheduled: list[tuple[Sequence, int]]) -> tuple[Step, list[Sequence]]:
    """The arrays of a step, and the sequences whose next token is drawn from it, in the order of its logit rows."""
    token_ids: list[int] = []
    cu_seqlens_q = [0]
    logit_rows: list[int] = []
    drawing: list[Sequence] = []
    for sequence, num_tokens in scheduled:
        begin = sequence.num_computed_tokens
        token_ids += sequence.token_ids[begin : begin + num_tokens]
        cu_seqlens_q.append(len(token_ids))
        if num_tokens == sequence.num_missing_tokens:
            logit_rows.append(len(token_ids) - 1)
            drawing.append(sequence)
    block_tables = np.zeros((len(scheduled), max(len(s.blocks) for s, _ in scheduled)), np.int32)
    for row, (sequence, _) in enumerate(scheduled):
        block_tables[row, : len(sequence.blocks)] = sequence.blocks
    step = Step(
        token_ids=np.array(token_ids, np.int32),
        cu_seqlens_q=np.array(cu_seqlens_q, np.int32),
        context_lens=np.array([s.num_computed_tokens for s, _ in scheduled], np.int32),
        block_tables=block_tables,
        logit_rows=np.array(logit_rows, np.int32),
    )
    return step, drawing


def _sample_row(sequence: Sequence) -> SampleRow:
    params = sequence.params
    return SampleRow(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=sequence.seed,
        position=sequence.num_output_tokens,
        logprobs=params.logprobs,
    )
