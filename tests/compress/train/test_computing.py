"""How torch computes while it trains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from nybble.compress.train.setup import computing  # noqa: E402

_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FAULTS = """
import resource, torch
from nybble.compress.train.setup import computing
with computing(1):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not _HUGE.exists() or "[never]" in _HUGE.read_text(), reason="the kernel hands out no huge pages")
def test_large_tensors_come_in_huge_pages() -> None:
    """64 MB are 16384 pages of 4 kB."""
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4096


def test_threads_are_what_they_were_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), computing(1):
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before
