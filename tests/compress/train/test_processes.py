"""Two processes with shards of the weights follow the curve of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from train_helpers import distil, losses, qat, short

from nybble.checkpoint import open_checkpoint
from nybble.core.errors import ConfigError

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

from nybble.compress.train.group import joined  # noqa: E402  # needs torch

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PROGRAM = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from nybble.compress.distil import DistilOptions, run_distil
from nybble.compress.qat import QatOptions, run_qat
kind, source, target, fields = sys.argv[1:]
fields = json.loads(fields)
if kind == "distil":
    run_distil(Path(source), Path(target), DistilOptions(teacher=Path(fields.pop("teacher")), **fields))
else:
    run_qat(Path(source), Path(target), QatOptions(to=kind, **fields))
"""


def two_processes(kind: str, source: Path, target: Path, fields: dict[str, Any]) -> None:
    program = target.parent / "program.py"
    program.write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*launch, kind, str(source), str(target), json.dumps(fields)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["distil", "int4"])
def test_two_processes_train_like_one(llama: Path, student: Path, text: Path, tmp_path: Path, kind: str) -> None:
    fields = {"steps": 8, "learning_rate": 1e-3}
    if kind == "distil":
        alone = distil(student, tmp_path / "one", llama, text, **fields, batch=4)
        two_processes(kind, student, tmp_path / "two", short(text, **fields, teacher=str(llama)))
    else:
        alone = qat(llama, tmp_path / "one", kind, text, **fields, batch=4)
        two_processes(kind, llama, tmp_path / "two", short(text, **fields))
    assert losses(tmp_path / "two" / "train.jsonl") == pytest.approx(losses(alone.log), rel=2e-4)
    if kind == "distil":
        start, one, two = (open_checkpoint(path).tensors for path in (student, tmp_path / "one", tmp_path / "two"))
        for name, tensor in one.items():
            moved = abs(tensor.to_float32() - start[name].to_float32()).mean()
            # Single weights whose gradient is hardly more than rounding may go the other way.
            assert abs(tensor.to_float32() - two[name].to_float32()).mean() < 0.02 * moved, name
    assert not (tmp_path / "two.partial").exists()


def test_variables_that_make_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(ConfigError, match="RANK 5 is not one of 2 processes"), joined():
        pass
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'many', not a number"), joined():
        pass
