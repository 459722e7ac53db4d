"""What the tests of folders share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nybble.backends.torch import TorchDecoder
from nybble.checkpoint import open_checkpoint
from nybble.compress import methods, table
from nybble.compress.methods import QuantizeReport, QuantizeRequest, Silent

assert table  # registers the types

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 40)))


class Notes(Silent):
    """Keeps what a pass says."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.total = 0
        self.done = 0

    def start(self, total: int) -> None:
        self.total = total

    def advance(self, weights: int, what: str) -> None:
        self.done += weights

    def note(self, message: str) -> None:
        self.notes.append(message)


def run(source: Path, target: Path, to: str, progress: Silent | None = None, **fields: Any) -> QuantizeReport:
    """Quantise. Fields of the request are taken by their name; all others are options."""
    own = {name: fields.pop(name) for name in ("tensors", "imatrix", "force", "dry_run") if name in fields}
    method = methods.find(to, target)
    return method.run(QuantizeRequest(source, target, method, options=fields, **own), progress or Silent())


def calibrated(text: Path) -> dict[str, Any]:
    """Options for a short calibration."""
    return {"calibrate": str(text), "calibration_samples": 16, "calibration_tokens": 64}


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return TorchDecoder(open_checkpoint(path)).logits(TOKENS)


def errors_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What `--report` wrote about each linear."""
    linears: dict[str, dict[str, Any]] = json.loads((folder / "quantization_report.json").read_text())["linears"]
    return linears


def quantisation(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config
