"""Beam search over any engine: in each round, one token for every beam; the prefix cache keeps that cheap."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nybble.core.errors import ConfigError
from nybble.core.outputs import RequestOutput
from nybble.core.sampling import MAX_LOGPROBS, SamplingParams

Step = Callable[[list[list[int]], SamplingParams], list[RequestOutput]]


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """How a search goes.

    Raises:
        ConfigError: a value is out of range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0  # of the log-probabilities that are summed; 0 leaves them as they are
    length_penalty: float = 1.0  # a sequence's score is its log-probability over its length to this power

    def __post_init__(self) -> None:
        if not 1 <= self.beam_width <= MAX_LOGPROBS // 2:
            raise ConfigError(f"beam_width must be between 1 and {MAX_LOGPROBS // 2}, not {self.beam_width}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.temperature != 0.0:
            raise ConfigError("a beam search takes the likeliest sequences: leave temperature at 0")


@dataclass(slots=True)
class BeamSearchSequence:
    """One continuation, with the prompt before it."""

    tokens: list[int]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The best continuations of one prompt, best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)


def search(
    prompt: list[int],
    params: BeamSearchParams,
    *,
    step: Step,
    decode: Callable[[Iterable[int]], str],
    eos_token_ids: frozenset[int],
    context: int,
) -> BeamSearchOutput:
    """The likeliest continuations of one prompt. `step` draws one token after each sequence, with log-probabilities."""
    row = SamplingParams(temperature=0.0, max_tokens=1, logprobs=2 * params.beam_width, ignore_eos=True)
    beams = [BeamSearchSequence(list(prompt))]
    complete: list[BeamSearchSequence] = []

    def score(beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - len(prompt)
        if beam.finish_reason == "stop":
            length -= 1  # the end token says nothing
        return beam.cum_logprob / float(max(length, 1) ** params.length_penalty)

    for _ in range(min(params.max_tokens, context - len(prompt))):
        candidates: list[BeamSearchSequence] = []
        for beam, output in zip(beams, step([beam.tokens for beam in beams], row), strict=True):
            if output.error is not None:
                raise RuntimeError(output.error)
            positions = output.outputs[0].logprobs or [{}]
            for token_id, entry in positions[0].items():
                longer = BeamSearchSequence([*beam.tokens, token_id], beam.cum_logprob + entry.logprob)
                if token_id in eos_token_ids and not params.ignore_eos:
                    longer.finish_reason = "stop"
                    complete.append(longer)
                else:
                    candidates.append(longer)
        candidates.sort(key=score, reverse=True)
        beams = candidates[: params.beam_width]
    for beam in beams:
        beam.finish_reason = "length"
    best = sorted([*complete, *beams], key=score, reverse=True)[: params.beam_width]
    for beam in best:
        beam.text = decode(beam.tokens)
    return BeamSearchOutput(best)
