"""What the tests of pruning share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nybble.backends.torch import TorchDecoder
from nybble.checkpoint import open_checkpoint
from nybble.compress.methods import Silent
from nybble.compress.prune.options import PruneOptions
from nybble.compress.prune.run import run_prune
from nybble.compress.stage import StageResult

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 40)))
CALIBRATED: dict[str, Any] = {"calibration_samples": 16, "calibration_tokens": 64}


class Notes(Silent):
    """Keeps what a pass says. interrupt_at: as if somebody pressed Ctrl-C when this is worked on."""

    def __init__(self, interrupt_at: str | None = None) -> None:
        self.notes: list[str] = []
        self.total = 0
        self.done = 0
        self._interrupt_at = interrupt_at

    def start(self, total: int) -> None:
        self.total = total

    def advance(self, weights: int, what: str) -> None:
        self.done += weights
        if self._interrupt_at is not None and self._interrupt_at in what:
            raise KeyboardInterrupt

    def note(self, message: str) -> None:
        self.notes.append(message)


def prune(
    source: Path,
    target: Path,
    progress: Silent | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    **options: Any,
) -> StageResult:
    return run_prune(source, target, PruneOptions(**options), progress=progress or Silent(), resume=resume, force=force)


def values(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Every tensor of a model, by canonical name."""
    return {name: np.array(tensor.to_float32()) for name, tensor in open_checkpoint(path).tensors.items()}


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return TorchDecoder(open_checkpoint(path)).logits(TOKENS)
