"""The training loop: the same curve after any interruption, nothing lost, and clear words when it cannot go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from train_helpers import Interrupt, Notes, distil, losses, short

from nybble.checkpoint import open_checkpoint
from nybble.core.errors import ConfigError, OutputError, TrainingError

torch = pytest.importorskip("torch")

from nybble.compress.train import loop, state  # noqa: E402  # needs torch
from nybble.compress.train.log import read_log  # noqa: E402
from nybble.compress.train.schedule import factor  # noqa: E402

pytestmark = [pytest.mark.e2e]


def weights(path: Path) -> dict[str, Any]:
    return {name: tensor.to_float32() for name, tensor in open_checkpoint(path).tensors.items()}


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return all((one[name] == other[name]).all() for name in one)


def test_the_loss_falls_and_the_log_says_so(llama: Path, student: Path, text: Path, tmp_path: Path) -> None:
    progress = Notes()
    result = distil(student, tmp_path / "out", llama, text, steps=40, learning_rate=3e-3, progress=progress)
    lines = read_log(tmp_path / "out" / "train.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert set(lines[0]) == {
        "step", "loss", "kl", "cross_entropy", "learning_rate", "gradient_norm", "tokens_per_second", "seconds",
    }  # fmt: skip
    assert result.figures["last_loss"] < 0.8 * result.figures["first_loss"]  # type: ignore[operator]
    assert any("step 4 of 40, loss" in note and "left" in note for note in progress.notes)
    assert not (tmp_path / "out.partial").exists()


def test_the_same_seed_gives_the_same_model(llama: Path, student: Path, text: Path, tmp_path: Path) -> None:
    first = distil(student, tmp_path / "a", llama, text, seed=3)
    second = distil(student, tmp_path / "b", llama, text, seed=3)
    other = distil(student, tmp_path / "c", llama, text, seed=4)
    assert losses(first.log) == losses(second.log) != losses(other.log)
    assert same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_after_ctrl_c_the_curve_is_that_of_an_unbroken_run(
    llama: Path, student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    unbroken = distil(student, tmp_path / "a", llama, text, accumulate=accumulate)
    with monkeypatch.context() as patch:
        Interrupt(patch, 3, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            distil(student, tmp_path / "b", llama, text, accumulate=accumulate)
    assert not (tmp_path / "b").exists()
    assert state.unfinished(tmp_path / "b.partial") == 3
    progress = Notes()
    resumed = distil(student, tmp_path / "b", llama, text, accumulate=accumulate, resume=True, progress=progress)
    assert "going on after step 3" in progress.notes
    assert losses(resumed.log) == losses(unbroken.log)
    assert same(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_after_kill_9_the_curve_is_that_of_an_unbroken_run(
    llama: Path, student: Path, text: Path, tmp_path: Path
) -> None:
    fields = short(text, steps=400, save_minutes=1e-4)
    code = (
        "import sys, json, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from nybble.compress.distil import DistilOptions, run_distil\n"
        "student, target, teacher, fields = sys.argv[1:]\n"
        "options = DistilOptions(teacher=Path(teacher), **json.loads(fields))\n"
        "run_distil(Path(student), Path(target), options)\n"
    )
    arguments = [sys.executable, "-c", code, str(student), str(tmp_path / "b"), str(llama), json.dumps(fields)]
    process = subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 240
    while (state.unfinished(tmp_path / "b.partial") or 0) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = state.unfinished(tmp_path / "b.partial")
    assert step is not None and step < 400 and not (tmp_path / "b").exists()
    fields |= {"steps": step + 4}
    run = json.loads((tmp_path / "b.partial" / "run.json").read_text())
    run["training"]["steps"] = step + 4  # a shorter run, so that the test is
    (tmp_path / "b.partial" / "run.json").write_text(json.dumps(run))
    position = sorted((tmp_path / "b.partial").glob("step-*.json"))[-1]
    position.write_text(json.dumps({**json.loads(position.read_text()), "total": step + 4}))
    before = read_log(tmp_path / "b.partial" / "train.jsonl")[:step]
    resumed = distil(student, tmp_path / "b", llama, text, **fields, resume=True)
    again = losses(resumed.log)
    assert again[:step] == [line["loss"] for line in before]
    assert len(again) == step + 4


def test_lines_of_steps_that_are_done_again_are_cut_off(
    llama: Path, student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = distil(student, tmp_path / "a", llama, text)
    with monkeypatch.context() as patch:
        Interrupt(patch, 3, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            distil(student, tmp_path / "b", llama, text)
    with (tmp_path / "b.partial" / "train.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 99.0}\n{"step": 5, "lo')
    resumed = distil(student, tmp_path / "b", llama, text, resume=True)
    assert losses(resumed.log) == losses(unbroken.log)


def test_other_options_are_not_gone_on_with(
    llama: Path, student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Interrupt(patch, 3, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            distil(student, tmp_path / "b", llama, text)
    with pytest.raises(ConfigError, match="holds a run with another options"):
        distil(student, tmp_path / "b", llama, text, resume=True, temperature=3.0)
    with pytest.raises(ConfigError, match="holds a run with another training"):
        distil(student, tmp_path / "b", llama, text, resume=True, seed=1)
    distil(student, tmp_path / "b", llama, text, resume=True, learning_rate=1e-5)


def test_a_loss_that_is_no_number_stops_and_keeps_the_state(
    llama: Path, student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.Trainer._gradients
    unbroken = distil(student, tmp_path / "a", llama, text)

    def gradients(trainer: loop.Trainer) -> torch.Tensor:
        means = original(trainer)
        return means * float("nan") if trainer._step == 4 else means

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_gradients", gradients)
        with pytest.raises(TrainingError, match=r"loss of step 5 is nan.*kept in .*b\.partial.*--resume"):
            distil(student, tmp_path / "b", llama, text)
    assert not (tmp_path / "b").exists()
    assert state.unfinished(tmp_path / "b.partial") == 4
    assert losses(distil(student, tmp_path / "b", llama, text, resume=True).log) == losses(unbroken.log)


def test_no_room_for_checkpoints_is_said_before_anything_is_trained(
    llama: Path, student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Disk:
        free = 1000

    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: Disk)
    with pytest.raises(OutputError, match=r"needs [1-9]\d* MB for checkpoints and the disk has 0 MB left: make room"):
        distil(student, tmp_path / "out", llama, text)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(
    llama: Path, student: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = state.write_safetensors
    calls = []

    def write(path: Path, entries: Any, *, force: bool = False) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OutputError(f"{path} does not fit on the disk after 1 MB: make room")
        original(path, entries, force=force)

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_safetensors", write)
        with pytest.raises(OutputError, match="does not fit on the disk"):
            distil(student, tmp_path / "out", llama, text, save_minutes=1e-9)
    assert state.unfinished(tmp_path / "out.partial") == 2
    unbroken = distil(student, tmp_path / "a", llama, text)
    assert losses(distil(student, tmp_path / "out", llama, text, resume=True, save_minutes=5.0).log) == losses(
        unbroken.log
    )


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        state.RunFolder(tmp_path / "x.partial", {}, resume=False),
        pytest.raises(OutputError, match="in use by another process"),
        state.RunFolder(tmp_path / "x.partial", {}, resume=True),
    ):
        pass


def test_minutes_become_steps(llama: Path, student: Path, text: Path, tmp_path: Path) -> None:
    result = distil(student, tmp_path / "out", llama, text, steps=None, minutes=0.02)
    lines = read_log(result.log)  # type: ignore[arg-type]
    assert int(str(result.figures["steps"])) == len(lines) >= 7
    rates = [float(str(line["learning_rate"])) for line in lines]
    assert len(rates) == 7 or rates[-1] < rates[6]


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [factor(step, warmup=4, total=100) for step in range(100)]
    assert rates[0] == pytest.approx(0.25, rel=0.01) and max(rates) == rates[3]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, abs=0.002)
    assert factor(50, warmup=4, total=None) == 1


def test_saving_memory_changes_nothing(llama: Path, student: Path, text: Path, tmp_path: Path) -> None:
    plain = distil(student, tmp_path / "a", llama, text)
    saving = distil(student, tmp_path / "b", llama, text, recompute=True)
    assert losses(plain.log) == pytest.approx(losses(saving.log), rel=1e-5)


def test_bfloat16_is_near(llama: Path, student: Path, text: Path, tmp_path: Path) -> None:
    plain = distil(student, tmp_path / "a", llama, text)
    half = distil(student, tmp_path / "b", llama, text, bf16=True)
    assert losses(plain.log) != losses(half.log)
    assert losses(plain.log) == pytest.approx(losses(half.log), rel=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"minutes": 1.0}, "give one of them"),
        ({"steps": 0}, "steps must be 1 to"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"weight_decay": 2.0}, "weight_decay must be from 0 to 1"),
        ({"alpha": -1.0}, "alpha must be from 0"),
        ({"temperature": 0.0}, "temperature must be from"),
        ({"top_k": 4, "hidden": 1.0}, "give one of them"),
        ({"cache": Path("x")}, "give top_k too"),
        ({"seq_len": 4096}, "more than the model's context of 512"),
    ],
)
def test_options_that_cannot_be(
    llama: Path, student: Path, text: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        distil(student, tmp_path / "out", llama, text, **fields)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
