"""A folder for files that are gone as soon as they have been read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nybble.core import env
from nybble.core.errors import OutputError


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Beside the models, where there is space for weights. Raises OutputError if none can be made there."""
    home = env.home()
    try:
        home.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="quantised-", dir=home, ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(f"{home} cannot hold the quantised weights: {error.strerror}; set NYBBLE_HOME") from None
    with folder as path:
        yield Path(path)
