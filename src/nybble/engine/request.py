"""A request on its way through the engine, and the sequences that it consists of."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from nybble.backends.cpu import SampleRow
from nybble.cache.block_pool import BLOCK_SIZE, block_hash, root_hash
from nybble.core.outputs import FinishReason, PositionLogprobs, RequestMetrics
from nybble.core.sampling import SamplingParams
from nybble.engine.adapters import LoadedAdapter
from nybble.engine.text import TextStream

Pooling = Literal["mean", "last"]


class Matcher(Protocol):
    """The grammar state of one sequence: see nybble.engine.grammar."""

    def fill_mask(self, out: npt.NDArray[np.uint32]) -> None: ...

    def accept(self, token_id: int) -> bool: ...

    def is_finished(self) -> bool: ...

    def forced_tokens(self) -> list[int]: ...

    def likely_tokens(self, limit: int) -> list[int]: ...

    def fork(self) -> Matcher: ...


class Rules(Protocol):
    """How tokens are drawn: see nybble.engine.rows."""

    def row(self, sequence: Sequence) -> SampleRow: ...


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request: its tokens, its blocks, and what has not been told about it yet."""

    request: Request
    index: int  # which sample
    seed: int
    token_ids: list[int]  # the prompt, then the output
    text: TextStream
    max_total_tokens: int  # prompt and output never exceed this
    matcher: Matcher | None = None
    blocks: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0  # how many have their keys and values in the cache
    num_published: int = 0  # full blocks that the prefix cache knows
    hashes: list[bytes] = field(default_factory=list)  # of full blocks
    slot: int = -1  # its row in the scheduler's block tables; -1: it is not running
    scheduled_in: int = -1  # the last step that it was part of
    guesses: list[int] = field(default_factory=list)  # that go through the model behind its tokens in this step
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    # The output, and how much of it has been told.
    output_text: list[str] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    told_tokens: int = 0
    told_pieces: int = 0
    is_told: bool = False  # that it is finished
    _output: npt.NDArray[np.int32] | None = None  # room for all that it can write; the first of them are filled
    _num_filled: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_missing_tokens(self) -> int:
        """How many tokens must still go through the model before the next one can be drawn."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    def output_array(self) -> npt.NDArray[np.int32]:
        """The output as an array. Only what is new since the last call is copied."""
        count = self.num_output_tokens
        if self._output is None:
            self._output = np.empty(self.max_total_tokens - self.num_prompt_tokens, np.int32)
        if count > self._num_filled:
            self._output[self._num_filled : count] = self.token_ids[self.num_prompt_tokens + self._num_filled :]
            self._num_filled = count
        return self._output[:count]

    def hash_of_block(self, index: int) -> bytes:
        """What the prefix cache knows a full block by."""
        while len(self.hashes) <= index:
            at = len(self.hashes)
            parent = self.hashes[-1] if self.hashes else self.request.root_hash
            self.hashes.append(block_hash(parent, self.token_ids[at * BLOCK_SIZE : (at + 1) * BLOCK_SIZE]))
        return self.hashes[index]


@dataclass(slots=True, eq=False)
class Request:
    """What was asked for. Made by `EngineCore.make_request`, which checks it."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    rules: Rules
    prompt: str | None = None
    priority: int = 0  # the lower, the earlier
    cache_salt: str | None = None
    adapter: LoadedAdapter | None = None
    pooling: Pooling | None = None  # not None: a vector is wanted, not tokens
    arrival: int = 0  # number in the order of arrival
    sequences: list[Sequence] = field(default_factory=list)
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.monotonic()))
    num_cached_tokens: int | None = None
    prompt_logprobs: list[PositionLogprobs | None] = field(default_factory=list)
    pooled: npt.NDArray[np.float64] | None = None  # the last hidden state, or the sum of all
    error: str | None = None
    is_refused: bool = False  # the error is in what it asked for
    is_forked: bool = False  # the samples beyond the first have their own blocks

    @property
    def root_hash(self) -> bytes:
        """What its first block follows in the prefix cache."""
        return root_hash(self.cache_salt, self.adapter.id if self.adapter else "")

    @property
    def order(self) -> tuple[int, int]:
        """Requests with a smaller one go first."""
        return self.priority, self.arrival

    @property
    def wants_all_hidden(self) -> bool:
        """Whether every token of the prompt has to go through the model, so that the prefix cache is of no use."""
        return self.params.prompt_logprobs is not None or self.pooling == "mean"

    @property
    def is_complete(self) -> bool:
        """Whether it ended by itself."""
        return all(sequence.finish_reason in ("stop", "length") for sequence in self.sequences)

    @property
    def is_finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)
