"""The working folder of a recipe, `DST.partial`: what each finished stage wrote, and what was found out about it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from nybble.compress.stage import StageResult, partial
from nybble.core.errors import OutputError
from nybble.formats.safetensors import read_json
from nybble.formats.safetensors_writer import write_json


@dataclass(frozen=True, slots=True)
class Finished:
    """A stage that is done. path: what it wrote. seconds: how long that took, all runs together are not counted."""

    path: Path
    result: StageResult
    seconds: float


class RecipeFolder:
    """Locked while it is used. Nothing in it is lost by an interruption, or by leaving the `with` block."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = partial(target)
        self._lock: int | None = None

    def __enter__(self) -> RecipeFolder:
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.__exit__(None, None, None)
            raise OutputError(f"{self.target} is being written by another process: wait for it") from None
        except OSError as e:
            self.__exit__(None, None, None)
            raise OutputError(f"{self.path} cannot be written: {e.strerror or e}") from e
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def num_finished(self) -> int:
        """Stages that an earlier run left behind."""
        return len(list(self.path.glob("*.done.json"))) if self.path.is_dir() else 0

    def started(self, name: str) -> bool:
        """Whether an earlier run, of whatever recipe, began something here."""
        return (self.path / f"{name}.begun.json").exists()

    def finished(self, name: str, identity: str) -> Finished | None:
        """What a stage wrote, if it is there and was made from the same things with the same options."""
        note, path = self.path / f"{name}.done.json", self.path / name
        if not note.exists() or not path.exists():
            return None
        about = read_json(note)
        if about.get("identity") != identity:
            return None
        figures, notes, log = about.get("figures"), about.get("notes"), about.get("log")
        result = StageResult(
            figures if isinstance(figures, Mapping) else {},
            Path(log) if isinstance(log, str) else None,
            tuple(map(str, notes)) if isinstance(notes, list) else (),
        )
        return Finished(path, result, float(str(about.get("seconds", 0))))

    def begin(self, name: str, identity: str) -> bool:
        """Make room for a stage. Whether there is unfinished work of the very same stage to go on with."""
        note, path = self.path / f"{name}.begun.json", self.path / name
        same = note.exists() and read_json(note).get("identity") == identity
        stale = [path, self.path / f"{name}.done.json"]
        if not same:
            stale += [partial(path), path.with_name(f".{name}.part")]
        for one in stale:
            if one.is_dir():
                shutil.rmtree(one)
            else:
                one.unlink(missing_ok=True)
        write_json(note, {"identity": identity})
        return same

    def finish(self, name: str, identity: str, result: StageResult, seconds: float) -> Finished:
        """Remember it."""
        about = {
            "identity": identity,
            "figures": result.figures,
            "notes": list(result.notes),
            "log": None if result.log is None else str(result.log),
            "seconds": seconds,
        }
        write_json(self.path / f"{name}.done.json", about)
        return Finished(self.path / name, result, seconds)

    def deliver(self, last: Path, report: Path, report_target: Path) -> None:
        """The report and the model get their names, and all else goes. Raises OutputError."""
        try:
            for source, target in ((report, report_target), (last, self.target)):
                old = target.with_name(f".{target.name}.old")
                if target.exists():
                    target.rename(old)
                source.rename(target)
                if old.is_dir():
                    shutil.rmtree(old)
                else:
                    old.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self.path)
        except OSError as e:
            raise OutputError(f"{self.target} cannot be written: {e.strerror or e}") from e
