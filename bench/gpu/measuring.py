"""What the benchmarks of kernels share: the ceilings of the device, honest medians, and one JSON file per table."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from nybble import __version__

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
Work = Callable[[], object]


def copy_gb_s(num_bytes: int = 2**31 if ON_GPU else 2**22) -> float:
    """Bytes read and written in a second by a large copy: the best of ten."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * num_bytes / min(_once(lambda: target.copy_(source)) for _ in range(10)) / 1e9


def matrix_tflops(size: int = 8192 if ON_GPU else 128) -> float:
    """Of torch's own bfloat16 product of two large matrices: the best of ten."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in "ab")
    return 2 * size**3 / min(_once(lambda: a @ b) for _ in range(10)) / 1e12


def medians(functions: dict[str, Work], rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Microseconds of each, interleaved, each on a second-level cache that holds something else; and what failed.

    Interleaved rounds share whatever the machine does meanwhile. The first round compiles and is not counted.
    """
    taken: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    trash = torch.empty(2**29 if ON_GPU else 1, dtype=torch.uint8, device=DEVICE)
    for number in range(rounds + 2):
        for name, work in functions.items():
            if name in failed:
                continue
            try:
                trash.zero_()  # long enough that the kernel is queued before it ends
                seconds = _once(work)
            except Exception as error:  # it stands in the table, and the others go on
                failed[name] = str(error).splitlines()[0][:200]
                continue
            if number > 1:
                taken.setdefault(name, []).append(seconds * 1e6)
    cells = {
        name: {"us": statistics.median(values), "us_least": min(values), "us_most": max(values)}
        for name, values in taken.items()
    }
    return cells, failed


def _once(work: Work) -> float:
    """Seconds on the device."""
    if not ON_GPU:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def facts() -> dict[str, Any]:
    """Where and with what this was measured, with the ceilings of the same run."""
    return {
        "nybble": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu (interpreter: times mean nothing)",
        "copy_gb_s": copy_gb_s(),
        "matrix_bf16_tflops": matrix_tflops(),
    }


def save(report: dict[str, Any], out: Path | None, name: str) -> None:
    """Into out/name.json, if there is an `out`."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")


def write(report: dict[str, Any], out: Path | None, name: str) -> None:
    """A file, and the last line of the output."""
    save(report, out, name)
    print(json.dumps(report))
