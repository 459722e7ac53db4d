"""A file that appears under its name only when it is complete and on the disk."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from nybble.core.errors import OutputError

if TYPE_CHECKING:
    from typing_extensions import Buffer


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raises OutputError if there is something at `path` that may not be replaced."""
    if path.is_dir():
        raise OutputError(f"{path} is a folder: give the name of a file")
    if not force and (path.exists() or path.is_symlink()):
        raise OutputError(f"{path} exists already: choose another name, or replace it with --force")


class OutputFile:
    """Writes beside the target under a name of its own, and renames at the end of a `with` block without errors.

    After an error, or when the process is interrupted, nothing is left behind. Raises OutputError.
    """

    def __init__(self, path: Path, *, force: bool = False) -> None:
        refuse_existing(path, force=force)
        self.path = path
        self._force = force
        self.at = 0
        try:
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        except OSError as e:
            raise self._failed(e) from e
        self._part = Path(name)
        self._file: BinaryIO = os.fdopen(handle, "wb", buffering=0)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._file.close()
            with contextlib.suppress(OSError):
                self._part.unlink()  # gone already if it has been renamed

    @property
    def part(self) -> Path:
        """Where the file lies until it gets its name; all that was written is in it."""
        return self._part

    def write(self, data: Buffer) -> None:
        """Append all of the data."""
        view = memoryview(data).cast("B")
        self.at += len(view)
        try:
            while len(view):
                view = view[self._file.write(view) :]
        except OSError as e:
            raise self._failed(e) from e

    def _commit(self) -> None:
        try:
            os.fsync(self._file.fileno())
            refuse_existing(self.path, force=self._force)
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(self._file.fileno(), 0o666 & ~mask)  # temporary files start as private ones
            self._part.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as e:
            raise self._failed(e) from e

    def _failed(self, error: OSError) -> OutputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"{self.path} does not fit on the disk after {self.at / 1e6:.0f} MB: make room")
        if error.errno == errno.ENOENT and not self.path.parent.is_dir():
            return OutputError(f"{self.path} cannot be written: the folder {self.path.parent} does not exist")
        return OutputError(f"{self.path} cannot be written: {error.strerror or error}")
