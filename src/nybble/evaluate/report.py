"""What an evaluation found, as plain data and as a JSON document."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nybble import __version__
from nybble.evaluate.bootstrap import LEVEL, RESAMPLES, SEED
from nybble.evaluate.scores import Loss, Quality

METRICS_VERSION = 1  # goes up when a figure changes its meaning


@dataclass(frozen=True, slots=True)
class Conditions:
    """What every figure of a report depends on."""

    text: str  # the file's name
    text_sha256: str
    ctx: int
    score_from: int  # the first scored token of a window, counted from 0
    windows: int
    scored_tokens: int
    bos: bool  # the first token of each window is replaced by the beginning-of-text token
    blocks: int  # that the bootstrap draws from
    activations: str  # the type that activations are multiplied in, see NYBBLE_ACT

    def sentence(self) -> str:
        """The convention, as every table and page states it."""
        begin = "its first token replaced by BOS" if self.bos else "without BOS"
        last = self.ctx - 1
        return (
            f"{self.text}: {self.windows} windows of {self.ctx} tokens, {begin}; tokens {self.score_from} to {last} of "
            f"each are scored, {self.scored_tokens} in all (as llama-perplexity does it). Activations in "
            f"{self.activations}. Intervals: 95 %, {RESAMPLES} resamples of {self.blocks} blocks."
        )


@dataclass(frozen=True, slots=True)
class Result:
    """One model."""

    name: str
    bytes: int  # of the GGUF file, or of the folder's safetensors files
    bpw: float  # bits per weight over all tensors, scales included
    linear_bpw: float  # over the matrices of the layers alone
    quality: Quality
    loss: Loss | None  # None: there was no reference, or this is it
    block_nll: tuple[float, ...]  # means per block of the bootstrap, in nats
    block_kl: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Report:
    """Models on one text. reference: the model that the others are compared with; not in `models` unless asked."""

    conditions: Conditions
    reference: Result | None
    models: tuple[Result, ...]

    @property
    def rows(self) -> tuple[Result, ...]:
        """The reference first, if there is one."""
        return self.models if self.reference is None else (self.reference, *self.models)

    def to_json(self) -> dict[str, Any]:
        """Data for `json.dumps`; a bound that is not known is null."""
        found = {
            "conditions": asdict(self.conditions),
            "confidence": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
            "reference": None if self.reference is None else asdict(self.reference),
            "models": [asdict(model) for model in self.models],
            "version": __version__,
            "metrics_version": METRICS_VERSION,
        }
        return dict(_without_nan(found))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
