"""How torch computes while it trains."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from nybble.compress.train.setup import computing  # noqa: E402

_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_GLIBC = hasattr(ctypes.CDLL(None), "mallopt")
# Page faults of making a tensor of 64 MB after as many bytes, and more, were used and freed.
_FAULTS = """
import resource, sys, torch
from nybble.compress.train.setup import computing
with computing(1):
    before = [torch.ones(1 << 24) for _ in range(int(sys.argv[1]))]
    del before
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


def faults(*, freed: int, **environment: str) -> int:
    command = [sys.executable, "-c", _FAULTS, str(freed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return int(done.stdout)


@pytest.mark.skipif(not _HUGE.exists() or "[never]" in _HUGE.read_text(), reason="the kernel hands out no huge pages")
def test_large_tensors_come_in_huge_pages() -> None:
    """64 MB are 16384 pages of 4 kB."""
    assert faults(freed=0) < 4096


@pytest.mark.skipif(not _GLIBC, reason="only glibc can be told to keep what is freed")
def test_what_is_freed_is_taken_again() -> None:
    assert faults(freed=2, THP_MEM_ALLOC_ENABLE="0") < 4096


def test_threads_are_what_they_were_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), computing(1):
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before
