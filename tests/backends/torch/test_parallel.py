"""Two processes over gloo compute what one does, and when one is gone the other says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from backends.torch.serving import Folders, in_torch, run_some
from loras import make_lora
from models import to_gguf
from nybble import LLM, SamplingParams
from nybble.backends.torch.parallel import driver
from nybble.backends.torch.serve import TorchModel
from nybble.core.errors import BackendError, CheckpointError, ConfigError

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:.*model shards")]

GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, prompt_logprobs=1)
PROMPTS = [[(5 * i + 7 * p) % 250 for i in range(3 + 9 * p)] for p in range(4)]


def worker_ids(model: TorchModel) -> list[int]:
    assert model._team is not None
    return [worker.process.pid for worker in model._team._workers]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def ends(pid: int, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


def test_greedy_tokens_and_scores_of_two_processes(folders: Folders, tmp_path: Path) -> None:
    """gemma3 has one key head, which both ranks keep."""
    folder = folders("gemma3")
    one, two = (
        LLM(folder, device="torch-cpu", tensor_parallel_size=size, max_model_len=64, kv_cache_memory="8MiB", threads=2)
        for size in (1, 2)
    )
    for a, b in zip(one.generate(PROMPTS, GREEDY), two.generate(PROMPTS, GREEDY), strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        scores = [[next(iter(x.values())).logprob for x in o.prompt_logprobs[1:]] for o in (a, b)]
        np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    sampled = SamplingParams(temperature=1.0, seed=4, n=3, max_tokens=8)  # copies blocks
    assert [s.token_ids for s in one.generate(PROMPTS[3], sampled)[0].outputs] == [
        s.token_ids for s in two.generate(PROMPTS[3], sampled)[0].outputs
    ]
    with pytest.raises(ConfigError, match="adapters need tensor_parallel_size 1"):
        two._core.load_adapter(make_lora(folder, tmp_path / "lora"))
    two._loaded.model.close()  # type: ignore[attr-defined]
    assert all(ends(pid) for pid in worker_ids(two._loaded.model))  # type: ignore[arg-type]


def test_codes_of_a_file(folders: Folders, tmp_path: Path) -> None:
    """Codes are cut without decoding them; phi3 has q, k and v in one matrix."""
    pytest.importorskip("gguf")
    source = to_gguf(folders("phi3"), tmp_path / "model.gguf", "Q8_0")
    two = in_torch(source, tensor_parallel_size=2)
    try:
        for found, wanted in zip(run_some(two, 250), run_some(in_torch(source), 250), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    finally:
        two.close()


def test_a_rank_that_dies(folders: Folders) -> None:
    """While the engine works, without a hang, and for good."""
    folder = folders("llama")
    llm = LLM(folder, device="torch-cpu", tensor_parallel_size=2, max_model_len=64, kv_cache_memory="8MiB", threads=2)
    model = llm._loaded.model
    (pid,) = worker_ids(model)  # type: ignore[arg-type]
    os.kill(pid, signal.SIGSTOP)  # rank 0 waits in the middle of a step
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.5); os.kill({pid}, 9)"])
    output = llm.generate(PROMPTS[0], GREEDY)[0]
    killer.wait()
    assert output.outputs[0].finish_reason == "error"
    assert "rank 1 of the model is gone, it was killed by signal 9; the model cannot go on" in (output.error or "")
    assert "rank 1 of the model is gone" in (llm.generate(PROMPTS[1], GREEDY)[0].error or "")
    with pytest.raises(BackendError, match="load it again"):
        model.new_cache(4)


def test_workers_do_not_outlive_the_driver(folders: Folders) -> None:
    folder = folders("llama")
    code = (
        "import sys, time; from nybble import LLM\n"
        f"llm = LLM({str(folder)!r}, device='torch-cpu', tensor_parallel_size=2, max_model_len=64,"
        " kv_cache_memory='8MiB', threads=2)\n"
        "print(llm._loaded.model._team._workers[0].process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert is_running(pid)
        process.kill()
    assert ends(pid)


def test_a_rank_that_does_not_start(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders("llama")
    with pytest.raises(ConfigError, match="cannot be split over 3 ranks"):
        in_torch(folder, tensor_parallel_size=3)
    # What only a worker meets: the file is gone by the time that it looks.
    monkeypatch.setattr(driver, "_WORKER", "nybble.no_such_program")
    with pytest.raises(BackendError, match=r"rank 1 of 2 did not start: it left with the code 1: .*no_such_program"):
        in_torch(folder, tensor_parallel_size=2)
    monkeypatch.undo()
    real = driver._Worker

    class Misled(real):  # type: ignore[misc,valid-type]
        def __init__(self, rank: int, settings: dict[str, object]) -> None:
            super().__init__(rank, settings | {"path": str(tmp_path / "empty")})

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(driver, "_Worker", Misled)
    with pytest.raises(CheckpointError, match=r"rank 1 of 2 did not start: .*config\.json"):
        in_torch(folder, tensor_parallel_size=2)
