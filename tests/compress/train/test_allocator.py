"""Memory that a training run keeps."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from nybble.compress.train.setup import computing  # noqa: E402

_NUMBERS = 1 << 24  # 64 MB: more than the C library keeps by itself


def _faults() -> int:
    """Pages that the kernel hands over for a large tensor, when the allocator has seen a few of its size."""
    counts = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(_NUMBERS)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(counts)


def _resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_is_kept_while_computing_and_given_back_after() -> None:
    with computing(1):
        assert _faults() < 8
        during = _resident()
    assert _resident() < during - 4 * _NUMBERS // 2


def test_threads_are_what_they_were_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), computing(1):
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before
