"""Checkpoints of a training run: safetensors and JSON in `DST.partial`, complete or not there.

run.json                 what is trained, on what, how: who takes it up again must want the same
step-00000120.json       the step, how many there will be, what has been seen; written after the weights
step-00000120.safetensors
train.jsonl              a line for each step
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from nybble.core.errors import CheckpointError, ConfigError, OutputError
from nybble.formats.safetensors import read_file, read_json
from nybble.formats.safetensors_writer import Entry, write_json, write_safetensors
from nybble.formats.stored import Stored, read_array

_RUN = "run.json"
LOG = "train.jsonl"


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run is. step: updates done. total: updates there will be, None while unknown. seconds: spent on them."""

    step: int
    total: int | None
    seconds: float


class RunFolder:
    """`DST.partial`, locked while it is used.

    identity: decides what comes out. Raises OutputError if the folder cannot be used, ConfigError if it holds another
    run and `resume` is asked for; without `resume` what is there is thrown away.
    """

    def __init__(self, path: Path, identity: Mapping[str, object], *, resume: bool) -> None:
        self.path = path
        self._identity = dict(identity)
        self._resume = resume
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise OutputError(f"{self.path} is in use by another process: wait for it") from None
        except OSError as e:
            self._unlock()
            raise OutputError(f"{self.path} cannot be written: {e.strerror or e}") from e
        try:
            self._begin()
        except BaseException:
            self._unlock()
            raise
        return self

    def _begin(self) -> None:
        run = self.path / _RUN
        if run.exists() and self._resume:
            self._check(read_json(run))
            return
        for path in self.path.iterdir():
            if path.is_file():
                path.unlink()
        write_json(run, self._identity)

    def _check(self, found: Mapping[str, object]) -> None:
        wanted = json.loads(json.dumps(self._identity))
        for key in wanted:
            if found.get(key) != wanted[key]:
                raise ConfigError(
                    f"{self.path} holds a run with another {key} ({_short(found.get(key))} instead of "
                    f"{_short(wanted[key])}): give the same options to go on with it, or start again without --resume"
                )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unlock()

    def remove(self) -> None:
        """The run is finished and its result written."""
        shutil.rmtree(self.path, ignore_errors=True)

    def need(self, num_bytes: int) -> None:
        """Raises OutputError if there is no room for two checkpoints: the old one stays until the new one is done."""
        free = shutil.disk_usage(self.path).free
        if free < 2 * num_bytes:
            raise OutputError(
                f"{self.path} needs {2 * num_bytes / 1e6:.0f} MB for checkpoints and the disk has {free / 1e6:.0f} MB "
                "left: make room, or write somewhere else"
            )

    def save(self, position: Position, tensors: Mapping[str, torch.Tensor]) -> None:
        """Then the checkpoints before it go. Raises OutputError, and leaves them, if it cannot be written."""
        stem = self.path / f"step-{position.step:08d}"
        entries = [Entry.of(name, Stored.of(_numpy(tensor))) for name, tensor in tensors.items()]
        write_safetensors(stem.with_suffix(".safetensors"), entries, force=True)
        write_json(stem.with_suffix(".json"), asdict(position))
        for other in self.path.glob("step-*"):
            if not other.name.startswith(stem.name):
                other.unlink(missing_ok=True)

    def load(self) -> tuple[Position, dict[str, torch.Tensor]] | None:
        """The last checkpoint, if there is one. Raises CheckpointError if it is damaged."""
        found = sorted(self.path.glob("step-*.json"))
        if not found:
            return None
        values = read_json(found[-1])
        step, total, seconds = values.get("step"), values.get("total"), values.get("seconds")
        good = isinstance(step, int) and (total is None or isinstance(total, int)) and isinstance(seconds, int | float)
        if not good:
            raise CheckpointError(f"{found[-1]} is damaged: start again without --resume")
        assert isinstance(step, int) and (total is None or isinstance(total, int)) and isinstance(seconds, int | float)
        tensors = {
            tensor.name: torch.from_numpy(np.array(read_array(tensor)))
            for tensor in read_file(found[-1].with_suffix(".safetensors"))
        }
        return Position(step, total, float(seconds)), tensors

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def unfinished(path: Path) -> int | None:
    """The step of the checkpoint in a run's folder, None if there is none."""
    found = sorted(path.glob("step-*.json")) if path.is_dir() else []
    return int(found[-1].stem.removeprefix("step-")) if found else None


def _numpy(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    array: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = tensor.detach().float().cpu().contiguous().numpy()
    return array


def _short(value: object) -> str:
    return json.dumps(value)[:60]
