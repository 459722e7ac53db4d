"""Calibration text that a model writes when it is asked for: `calibrate: self`.

Who runs a model is not known here: a command hands in the function that does, a `Sampler`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nybble.checkpoint import open_checkpoint
from nybble.compress.calibration.text import SELF
from nybble.compress.safetensors.options import DEFAULT_SAMPLES, DEFAULT_TOKENS
from nybble.tokenizer import load_tokenizer

# Writes documents of together about so many tokens with the model at a path: (model, num_tokens, seed) -> token ids.
Sampler = Callable[[Path, int, int], list[list[int]]]
Options = TypeVar("Options")


@dataclass(frozen=True)
class OwnText:
    """Texts that `model` writes when they are asked for, of together a little more than so many tokens.

    The same each time, so that an interrupted run goes on with what it began with.
    """

    sampler: Sampler = field(repr=False)  # what tells runs apart is the rest
    model: Path
    num_tokens: int

    def __call__(self) -> list[str]:
        """Raises as the sampler."""
        documents = self.sampler(self.model, self.num_tokens + self.num_tokens // 8, 0)  # cut again, they may be fewer
        tokenizer = load_tokenizer(open_checkpoint(self.model).tokenizer)
        return [tokenizer.decode(document) for document in documents]


def with_own_text(options: Options, sampler: Sampler | None, model: Path) -> Options:
    """Options (a dataclass) whose `calibrate` is `self` with what `model` is to write instead; others as they are.

    Without a sampler nobody can write, and they stay as they are too.
    """
    said: Any = options
    if sampler is None or getattr(said, "calibrate", None) != SELF:
        return options
    wanted = (said.calibration_samples or DEFAULT_SAMPLES) * (said.calibration_tokens or DEFAULT_TOKENS)
    replaced: Options = dataclasses.replace(said, calibrate=OwnText(sampler, model, wanted))
    return replaced
