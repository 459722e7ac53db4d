"""`--prefix-cache-file` of `nybble run`: a prompt is read once over two starts, and wrong values are one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from models import make_tiny

pytestmark = pytest.mark.e2e
NYBBLE = [sys.executable, "-c", "from nybble.cli.app import main; main()"]
PROMPT = "the lower and the other one then an end. " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("cached") / "tiny")


def run(model: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*NYBBLE, "run", str(model), PROMPT, "--raw", "--temperature", "0", "--max-tokens", "8", "--threads", "1"]
    return subprocess.run([*command, *map(str, options)], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_the_second_start_finds_the_prompt(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "kept.prefix-cache"
    plain = run(model)
    assert plain.returncode == 0, plain.stderr
    first = run(model, "--prefix-cache-file", file)
    written = file.read_bytes()
    second = run(model, "--prefix-cache-file", file, "--prefix-cache-size", "8MiB", "--verbose")
    assert first.stdout == plain.stdout
    assert second.stdout == plain.stdout
    assert len(written) > 10_000  # blocks of keys and values
    assert not list(model.parent.glob("*.prefix-cache"))  # the path that was given, and no other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prefix-cache-size", "8MiB"), "--prefix-cache-size is the size of a file: give --prefix-cache-file"),
        (("--prefix-cache-file", ""), "must be on, off or a path"),
        (("--prefix-cache-file", "on", "--prefix-cache-size", "much"), "is not an amount of memory"),
    ],
)
def test_wrong_values_are_refused(model: Path, options: tuple[str, ...], message: str) -> None:
    done = run(model, *options)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
