"""What a caller may ask of the choice of tokens, for one sequence. Plain data: the drawing itself is native."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nybble.core.errors import ConfigError

MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one sequence are chosen and when the sequence ends.

    Raises:
        ConfigError: a value lies outside the range that its comment gives.
    """

    temperature: float = 1.0  # >= 0; 0 is greedy, whatever the other fields say
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # (0, 1]: keep the likeliest tokens until their probabilities reach this sum
    min_p: float = 0.0  # [0, 1]: drop tokens less likely than this fraction of the likeliest
    seed: int | None = None  # None: a fresh one for every sequence
    max_tokens: int | None = 16  # None: until the end of the context
    logprobs: int | None = None  # how many of the likeliest tokens are reported beside the chosen one
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", self.temperature, ">= 0")
        _require(self.top_k >= 0, "top_k", self.top_k, ">= 0 (0 keeps every token)")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _require(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", self.seed, "between 0 and 2**64 - 1")
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(self.logprobs is None or 0 <= self.logprobs <= 100, "logprobs", self.logprobs, "between 0 and 100")
        _require(all(self.stop), "stop", self.stop, "made of non-empty strings")


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {expected}, not {value!r}")
