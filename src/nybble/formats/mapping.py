"""A file mapped into memory read-only, whose pages can be given back once they have been used."""

from __future__ import annotations

import mmap
from pathlib import Path

from nybble.core.errors import CheckpointError


class MappedFile:
    """The bytes of a file. Raises CheckpointError if it cannot be opened or is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise CheckpointError(f"{path} is empty: get a complete file") from None
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e
        self.view = memoryview(self._map)
        self.size = len(self._map)

    def release(self, begin: int = 0, end: int | None = None) -> None:
        """Give the whole pages inside [begin, end) back to the system; they come back from the file when read again."""
        begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        end = self.size if end is None else end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def close(self) -> None:
        """Unmap the file; views of it must be gone. Those that are not keep it open."""
        self.view.release()
        try:
            self._map.close()
        except BufferError:
            return  # somebody still reads a tensor: the mapping goes when they do
