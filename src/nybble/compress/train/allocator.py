"""Memory that a training run keeps between its steps.

The C library of Linux gives blocks of more than 32 MB back to the kernel as soon as they are free, and takes them again
page by page. A step frees and takes all activations and gradients, hundreds of megabytes, and lost a fifth of its time
there and more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# Names and numbers of <malloc.h>, and what they are without us.
_TRIM_THRESHOLD, _TRIM_DEFAULT = -1, 128 << 10
_MMAP_MAX, _MMAP_DEFAULT = -4, 65536
_NEVER = -1


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """As long as the block lasts, freed memory stays with the process; then it goes back.

    Without effect where the C library has no `mallopt`: macOS and musl keep such blocks or never do.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _MMAP_DEFAULT)
        library.mallopt(_TRIM_THRESHOLD, _TRIM_DEFAULT)
        library.malloc_trim(0)
