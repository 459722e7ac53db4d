"""`nybble distil` and `nybble qat`: options reach the run, and errors are one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models import make_tiny
from nybble.checkpoint import open_checkpoint
from nybble.compress.api import GPTQConfig, quantize
from nybble.compress.gguf.imatrix import read_imatrix

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = [pytest.mark.e2e]
SHORT = ["--steps", "3", "--seq-len", "32", "--batch", "1", "--threads", "1", "--warmup", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama", intermediate_size=128)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("".join(f"line {i}: the lower and the {i * 7919 % 1000} on\n" for i in range(200)), "utf-8")
    return path


def nybble(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "from nybble.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], capture_output=True, text=True
    )


def test_a_student_learns_from_a_text_and_from_what_the_teacher_writes(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    done = nybble(
        "distil", folder, tmp_path / "out", "--teacher", folder, "--data", text, "--data", "self", "--tokens", 400,
        "--alpha", 0.5, "--temperature", 2, *SHORT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 steps, 96 tokens" in done.stdout
    assert f"of {text.name} and text that the teacher wrote" in done.stderr and "step 3 of 3, loss" in done.stderr
    assert len((tmp_path / "out" / "train.jsonl").read_text().splitlines()) == 3
    assert len(open_checkpoint(tmp_path / "out").spec.layers) == 2


def test_a_model_is_trained_on_a_grid(folder: Path, text: Path, tmp_path: Path) -> None:
    done = nybble(
        "qat", folder, tmp_path / "out", "--to", "int4", "--group-size", 32, "--asymmetric", "--data", text,
        "--no-bf16", *SHORT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 32, False)
    done = nybble("qat", folder, tmp_path / "lora", "--to", "nf4", "--lora", "adapter", "--data", text, *SHORT)
    assert done.returncode == 0, done.stderr
    done = nybble("run", folder, "--adapter", tmp_path / "lora", "--max-tokens", "2", "the lower")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qat", "MODEL", "OUT", "--to", "int7"], "to is 'int7', which cannot be trained: did you mean"),
        (["qat", "MODEL", "OUT", "--to", "nf4", "--lora", "both"], "lora is 'both', but must be one of merge, adapter"),
        (["distil", "MODEL", "OUT", "--teacher", "MODEL", "--steps", "5", "--minutes", "1"], "give one of them"),
        (["distil", "MODEL", "OUT", "--teacher", "MODEL", "--data", "nothing.jsonl"], "nothing.jsonl cannot be read"),
        (["distil", "MODEL", "MODEL", "--teacher", "MODEL"], "exists already"),
    ],
)
def test_errors_are_one_sentence(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"MODEL": str(folder), "OUT": str(tmp_path / "out")}
    done = nybble(*[places.get(argument, argument) for argument in arguments])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1


def test_unfinished_work_is_not_lost_by_mistake(folder: Path, text: Path, tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / "step-00000120.json").write_text("{}")
    done = nybble("distil", folder, tmp_path / "out", "--teacher", folder, "--data", text, *SHORT)
    assert done.returncode == 2 and "holds an unfinished run at step 120: go on with --resume" in done.stderr
    assert work.is_dir()
    done = nybble("distil", folder, tmp_path / "out", "--teacher", folder, "--data", text, "--force", *SHORT)
    assert done.returncode == 0, done.stderr
    assert not work.exists()


def test_a_model_writes_the_text_that_it_is_calibrated_on(folder: Path, tmp_path: Path) -> None:
    few = ("--calibrate", "self", "--calibration-samples", 4, "--calibration-tokens", 32, "--threads", 1)
    written = []
    for name in ("a", "b"):
        done = nybble("quantize", folder, tmp_path / name, "--to", "gptq-4bit", "--group-size", 32, *few)
        assert done.returncode == 0, done.stderr
        assert "calibrated on 4 x 32 tokens of text that the model wrote" in done.stderr
        written.append((tmp_path / name / "model.safetensors").read_bytes())
    called = GPTQConfig(group_size=32, dataset="self", num_samples=4, sample_tokens=32)
    quantize(folder, called, tmp_path / "called", threads=1)
    assert written[0] == written[1] == (tmp_path / "called" / "model.safetensors").read_bytes()
    done = nybble("prune", folder, tmp_path / "c", "--method", "wanda", "--amount", 0.5, *few)
    assert done.returncode == 0, done.stderr
    assert "calibrated on 4 x 32 tokens of text that the model wrote" in done.stderr
    again = nybble("prune", folder, tmp_path / "c", "--method", "wanda", "--amount", 0.5, *few)
    assert again.returncode == 2 and "exists already" in again.stderr
    assert "writes 144 tokens" not in again.stderr


def test_a_model_writes_the_text_of_its_importance_matrix(folder: Path, tmp_path: Path) -> None:
    few = ("--text", "self", "--ctx", 32, "--chunks", 4)
    for name in ("a.gguf", "b.gguf"):
        done = nybble("imatrix", folder, "-o", tmp_path / name, *few)
        assert done.returncode == 0, done.stderr
        assert "4 windows of 32 tokens" in done.stdout
    assert read_imatrix(tmp_path / "a.gguf").datasets == ("text that the model wrote",)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    wide = nybble("imatrix", folder, "-o", tmp_path / "c.gguf", "--text", "self", "--ctx", 1 << 20)
    assert wide.returncode == 2 and "--ctx must be 8 to" in wide.stderr and "writes" not in wide.stderr
    done = nybble("imatrix", folder, "-o", tmp_path / "c.gguf", "--text", tmp_path / "none.txt")
    assert done.returncode == 2 and "none.txt cannot be read: No such file" in done.stderr


def test_no_text_is_written_where_none_is_read(folder: Path, tmp_path: Path) -> None:
    done = nybble("quantize", folder, tmp_path / "out", "--to", "nf4", "--calibrate", "self")
    assert done.returncode == 2
    assert done.stderr == "error: --calibrate does not go with --to nf4\n"
    dry = nybble("quantize", folder, tmp_path / "out", "--to", "gptq-4bit", "--calibrate", "self", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "writes" not in dry.stderr
