"""What a request gives back. Names and meanings are vLLM's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token, under the raw logits: before penalties, temperature and cuts."""

    logprob: float
    rank: int | None = None  # 1: the likeliest
    decoded_token: str | None = None


# Token id -> its log-probability, for one position. The token that was taken comes first.
PositionLogprobs = dict[int, Logprob]


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or token that ended it; None for the end-of-text token

    def finished(self) -> bool:
        """Whether nothing more comes."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened, in seconds of time.monotonic()."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0
    num_guesses: int = 0  # tokens that speculation computed along, and how many of them were right
    num_right_guesses: int = 0


@dataclass(slots=True)
class RequestOutput:
    """The state of a request: so far, since the last output, or at its end, as its `output_kind` says."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # the first token has none
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache
    metrics: RequestMetrics | None = None
    error: str | None = None  # with finish_reason "error": what went wrong
    is_refused: bool = False  # what went wrong is what the request asked for


@dataclass(slots=True)
class EmbeddingOutput:
    """The vector of one text, of length 1."""

    embedding: list[float] = field(default_factory=list)


@dataclass(slots=True)
class EmbeddingRequestOutput:
    """What `LLM.embed` gives for each prompt."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: EmbeddingOutput
    finished: bool = True
