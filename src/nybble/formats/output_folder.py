"""A folder that appears under its name only when it is complete, and whose unfinished work can be taken up again."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from nybble.core.errors import NybbleError, OutputError
from nybble.formats.output import OutputFile

_STATE = "state.json"


class WorkFolder:
    """A folder for unfinished work that no other process uses at the same time. Raises OutputError.

    plan: says what is being made. Files of an earlier, interrupted attempt are kept if its plan was the same, and
    thrown away otherwise. Leaving the `with` block keeps what is there, unless the reason is one that would come again:
    an error about the model or the options.
    """

    def __init__(self, work: Path, plan: dict[str, object], *, target: Path) -> None:
        """target: what is being made, for errors."""
        self.target = target
        self.work = work
        self._plan = json.dumps(plan, sort_keys=True)
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self.work.mkdir(exist_ok=True)
            self._lock = os.open(self.work, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise OutputError(f"{self.target} is being written by another process: wait for it") from None
        except OSError as e:
            self._unlock()
            raise self._failed(e) from e
        self._remove_unfinished()
        state = self.work / _STATE
        if not state.exists() or state.read_text("utf-8") != self._plan:
            for path in self.work.iterdir():
                path.unlink()
            with OutputFile(state, force=True) as file:
                file.write(self._plan.encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, NybbleError) and not issubclass(kind, OutputError):
            shutil.rmtree(self.work, ignore_errors=True)
        self._remove_unfinished()
        self._unlock()

    def _remove_unfinished(self) -> None:
        """Files that got no name yet, of this attempt or of one that was killed."""
        for left in self.work.glob(".*.part") if self.work.exists() else ():
            with contextlib.suppress(OSError):
                left.unlink()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _failed(self, error: OSError) -> OutputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"{self.target} does not fit on the disk: make room")
        if error.errno == errno.ENOENT and not self.target.parent.is_dir():
            return OutputError(f"{self.target} cannot be written: the folder {self.target.parent} does not exist")
        return OutputError(f"{self.target} cannot be written: {error.strerror or error}")


class OutputFolder(WorkFolder):
    """Collects files in `.NAME.part` beside the target; `commit` gives the folder its name."""

    def __init__(self, target: Path, plan: dict[str, object], *, force: bool = False, work: Path | None = None) -> None:
        """work: another place for the files until they are complete, on the same disk."""
        refuse_existing_folder(target, force=force)
        super().__init__(target.parent / f".{target.name}.part" if work is None else work, plan, target=target)
        self._force = force

    def commit(self, drop: list[Path]) -> None:
        """Give the folder its name, without the files in `drop`."""
        refuse_existing_folder(self.target, force=self._force)
        try:
            for path in [*drop, self.work / _STATE]:
                path.unlink(missing_ok=True)
            old = self.target.parent / f".{self.target.name}.old"
            if self.target.exists():
                self.target.rename(old)
            self.work.rename(self.target)
            if old.exists():
                shutil.rmtree(old)
        except OSError as e:
            raise self._failed(e) from e


def refuse_existing_folder(path: Path, *, force: bool) -> None:
    """Raises OutputError if there is something at `path` that may not be replaced.

    With `force` only a model folder is: to delete another one would be a mistake.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"{path} is not a folder: choose another name")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already: choose another name, or replace it with --force")
    if path.exists() and any(path.iterdir()) and not (path / "config.json").exists():
        raise OutputError(f"{path} is a folder without a model: it is not replaced")
