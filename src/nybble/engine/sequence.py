"""The state of one sequence while it is generated, and what is told about it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Literal

from nybble.core.sampling import SamplingParams
from nybble.engine.text import TextStream

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one sequence."""

    index: int  # which prompt it belongs to
    token_id: int
    text: str  # what may be shown now; empty while a character or a stop string is undecided
    finish_reason: FinishReason | None = None  # not None: this was the last one of its sequence
    logprob: float | None = None  # of the chosen token, if log-probabilities were asked for
    top_logprobs: tuple[tuple[int, float], ...] = ()  # likeliest tokens with theirs, in descending order


# Closing it early gives all blocks back.
Steps = Generator[list[TokenEvent], None, None]


@dataclass(slots=True)
class KeptPrefix:
    """Tokens whose keys and values stay in the cache between two calls, so that a longer prompt need not redo them.

    Made empty, filled by `generate(..., keep=...)`, given back by `Generator.drop()`.
    """

    token_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Sequence:
    """A prompt and what has been generated after it."""

    index: int
    token_ids: list[int]  # the prompt, then the output
    num_prompt_tokens: int
    max_total_tokens: int  # prompt and output never exceed this
    params: SamplingParams
    seed: int
    text: TextStream
    blocks: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0  # how many have their keys and values in the cache
    kept: KeptPrefix | None = None
    finish_reason: FinishReason | None = None

    @property
    def num_missing_tokens(self) -> int:
        """How many tokens must still go through the model before the next one can be drawn."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens
