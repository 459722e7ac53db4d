"""`nybble quantize` and `nybble convert` as a user meets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from models import make_tiny
from nybble.formats.gguf import GgufFile

NYBBLE = [sys.executable, "-c", "from nybble.cli.app import main; main()"]


def nybble(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*NYBBLE, *map(str, arguments)], capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "tiny")


def test_a_folder_becomes_a_small_file(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    done = nybble("quantize", folder, target, "--to", "q4_k_m", "--tensor", "attn_v=Q8_0", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "bits per weight" in done.stdout
    assert "note: matrices of width 64" in done.stderr
    assert GgufFile(target).tensors["blk.0.attn_v.weight"].format.name == "Q8_0"


def test_a_dry_run_says_the_size_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    dry = nybble("quantize", folder, target, "--to", "Q8_0", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "would be written, up to" in dry.stdout
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "Q9"), "--to Q9 is not a type nybble knows; it knows F32, F16"),
        (("--to", "Q4_0", "--tensor", "attn"), "--tensor takes REGEX=TYPE"),
        (("--to", "Q4_0", "--tensor", "nothing=Q8_0"), "fits the name of no matrix"),
        (("--to", "Q4_0", "--imatrix", "none.gguf"), "none.gguf cannot be read"),
        (("--to", "Q4_0", "--damp-percent", "0.1"), "--damp-percent does not go with Q4_0"),
    ],
)
def test_bad_options_are_one_line(folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = nybble("quantize", folder, tmp_path / "m.gguf", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_convert_and_the_refusal_to_overwrite(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"
    assert nybble("convert", folder, target).returncode == 0
    assert GgufFile(target).metadata["general.architecture"] == "llama"
    again = nybble("convert", folder, target)
    assert again.returncode == 2
    assert "exists already: choose another name, or replace it with --force" in again.stderr
    assert nybble("convert", folder, target, "--force").returncode == 0
