"""What the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.compress.distil import DistilOptions, run_distil
from nybble.compress.methods import Silent
from nybble.compress.qat import QatOptions, run_qat
from nybble.compress.stage import StageResult
from nybble.compress.train import loop
from nybble.compress.train.log import read_log


class Notes(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def short(text: Path, **fields: Any) -> dict[str, Any]:
    """Options of a run of a second."""
    base: dict[str, Any] = {
        "data": str(text), "steps": 6, "seq_len": 32, "batch": 2, "warmup": 2, "tokens": 3000, "bf16": False,
    }  # fmt: skip
    return {**base, **fields}


def distil(student: Path, target: Path, teacher: Path, text: Path, **fields: Any) -> StageResult:
    run_fields = {name: fields.pop(name) for name in ("resume", "progress", "force") if name in fields}
    options = DistilOptions(teacher=teacher, **short(text, **fields))
    return run_distil(student, target, options, **run_fields)


def qat(source: Path, target: Path, to: str, text: Path, **fields: Any) -> StageResult:
    run_fields = {name: fields.pop(name) for name in ("resume", "progress", "force") if name in fields}
    return run_qat(source, target, QatOptions(to=to, **short(text, **fields)), **run_fields)


def losses(log: Path | None) -> list[float]:
    assert log is not None
    return [float(str(line["loss"])) for line in read_log(log)]


class Interrupt:
    """Stops a run when it begins its n-th update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, error: type[BaseException]) -> None:
        original = loop.Trainer._gradients

        def gradients(trainer: loop.Trainer) -> torch.Tensor:
            if trainer._step == step:
                raise error
            return original(trainer)

        monkeypatch.setattr(loop.Trainer, "_gradients", gradients)
