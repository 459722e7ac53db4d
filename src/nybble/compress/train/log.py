"""What a run tells: a JSON line for each step in a file, a line of progress with the time left to whoever looks on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from nybble.compress.methods import Progress
from nybble.core.errors import OutputError

_SPOKEN = 10  # sentences about a whole run where there is no bar


class StepLog:
    """step: updates done before; lines of later ones, from before an interruption, are cut off."""

    def __init__(self, path: Path, step: int, progress: Progress) -> None:
        self.path = path
        self._progress = progress
        self._started = False
        self._spoken = -1
        kept = _lines_up_to(path, step)
        try:
            path.write_text("".join(kept), "utf-8")
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as e:
            raise OutputError(f"{path} cannot be written: {e.strerror or e}") from e
        self._done = step

    def add(self, step: int, total: int | None, values: Mapping[str, object], seconds_left: float | None) -> None:
        """step: of the update that these values are of, from 1."""
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as e:
            raise OutputError(f"{self.path} cannot be written: {e.strerror or e}") from e
        if total is None:
            return
        if not self._started:
            self._progress.start(total)
            self._started = True
            self._progress.advance(step, "")
        else:
            self._progress.advance(1, _words(step, total, values, seconds_left))
        part = step * _SPOKEN // total
        if part != self._spoken:
            self._spoken = part
            self._progress.note(_words(step, total, values, seconds_left))

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> list[dict[str, object]]:
    """The lines of a log."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _words(step: int, total: int, values: Mapping[str, object], seconds_left: float | None) -> str:
    loss = values.get("loss")
    said = f"step {step} of {total}, loss {loss:.4f}" if isinstance(loss, float) else f"step {step} of {total}"
    if seconds_left is None or step == total:
        return said
    minutes = seconds_left / 60
    return f"{said}, {minutes:.0f} min left" if minutes >= 1.5 else f"{said}, {seconds_left:.0f} s left"


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The complete lines of steps up to this one."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
        try:
            number = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            break  # the process was killed while it wrote this
        if line.endswith("\n") and isinstance(number, int) and number <= step:
            kept.append(line)
    return kept
