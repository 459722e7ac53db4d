"""What a conversion is asked for, and what it says afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nybble.compress.convert.proof import Proof
from nybble.compress.methods import Progress, QuantizeReport


@dataclass(frozen=True, slots=True)
class Conversion:
    """source: a GGUF file or a folder. dtype: F32, F16 or BF16 for all tensors of a plain folder; None: what loses
    nothing."""

    source: Path
    target: Path
    dtype: str | None = None
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """proof: None after a dry run."""

    report: QuantizeReport
    proof: Proof | None


class Steps:
    """Hands progress on to work that has several passes over the weights: it is started once, for all of them."""

    def __init__(self, progress: Progress, num_weights: int, passes: int) -> None:
        self._progress = progress
        progress.start(num_weights * passes)

    def start(self, total: int) -> None:
        """A pass begins, which is part of the whole."""

    def advance(self, weights: int, what: str) -> None:
        self._progress.advance(weights, what)

    def note(self, message: str) -> None:
        self._progress.note(message)
