"""The checks in C++: what Python cannot reach, against the library that the extension was linked from."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nybble import _native

pytestmark = pytest.mark.kernels
ROOT = Path(__file__).resolve().parents[2]
CHECKS = sorted(path for path in (ROOT / "native" / "tests").glob("*.cpp") if not path.name.startswith("bench_"))
FLAGS = {
    "generic": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-mbmi2"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
}


def library() -> Path:
    """The newest build's. There is none where nybble was installed from a wheel."""
    built = sorted((ROOT / "build").glob("*/libnybble_core.a"), key=lambda path: path.stat().st_mtime)
    if not built or shutil.which("c++") is None:
        pytest.skip("needs the build folder of an editable installation, and a compiler named c++")
    return built[-1]


@pytest.mark.parametrize("check", CHECKS, ids=lambda path: path.stem)
def test_cpp(check: Path, tmp_path: Path) -> None:
    isa = [flag for name in _native.available_isas() for flag in FLAGS.get(name, ())]
    command = ["c++", "-std=c++20", "-O1", "-ffp-contract=off", *isa, f"-I{ROOT / 'native'}"]
    program = tmp_path / check.stem
    built = subprocess.run(
        [*command, check, library(), "-pthread", "-o", program], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
