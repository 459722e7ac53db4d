"""What Triton's interpreter accepts its compiler may refuse: kernels are compiled for a Hopper GPU, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parents[3] / "bench" / "gpu" / "compile_kernels.py"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="Triton is here without its tools for GPUs"),
]


def test_compiles_for_a_gpu(tmp_path) -> None:
    only = ["norm", "draw", "paged decode torch.int8", "product Q4_K M=16"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--only", *only, "--out", str(tmp_path / "table.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "table.json").read_text())["kernels"]
    assert len(rows) > len(only)
    assert all(row["registers"] > 0 and row["spilled_bytes"] == 0 for row in rows)
