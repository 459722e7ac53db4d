"""The reference's logits between the pass that computes them and the passes that compare with them.

They lie in a temporary file as float32, whole rows: KL divergence comes out exactly as if both models had run side by
side, the reference runs once for any number of models, and one model at a time is in memory. What it costs is disk:
4 bytes x vocabulary per scored token, 0.8 GB for 8192 tokens of a vocabulary of 49152. The file has no name from the
start, so that it is gone with the process however that ends.
"""

from __future__ import annotations

import shutil
import tempfile
from types import TracebackType

import numpy as np
import numpy.typing as npt

from nybble.core.errors import ConfigError, OutputError

_SPARE_BYTES = 64 << 20  # left free for others

Floats32 = npt.NDArray[np.float32]


class LogitsSpool:
    """Rows of logits, written once and then read from the beginning as often as needed. Use it in a `with` block."""

    def __init__(self, rows: int, vocab_size: int) -> None:
        """Raises ConfigError if they do not fit beside what is on the disk."""
        needed, folder = rows * vocab_size * 4, tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        if needed + _SPARE_BYTES > free:
            raise ConfigError(
                f"the reference's logits for {rows} tokens take {needed / 1e9:.1f} GB and {folder} has "
                f"{free / 1e9:.1f} GB free: score fewer tokens with --tokens, or let TMPDIR name a larger disk"
            )
        self._vocab_size = vocab_size
        self._file = tempfile.TemporaryFile(prefix="nybble-logits-")  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> LogitsSpool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, rows: Floats32) -> None:
        """Append rows [n, vocab]. Raises OutputError if the disk does not take them."""
        try:
            self._file.write(np.ascontiguousarray(rows, np.float32).data)
        except OSError as e:
            raise OutputError(f"the reference's logits cannot be kept in {tempfile.gettempdir()}: {e.strerror}") from e

    def rewind(self) -> None:
        """The next row read is the first one."""
        self._file.seek(0)

    def read(self, rows: int) -> Floats32:
        """The next rows [n, vocab]."""
        data = self._file.read(rows * self._vocab_size * 4)
        return np.frombuffer(data, np.float32).reshape(-1, self._vocab_size)
