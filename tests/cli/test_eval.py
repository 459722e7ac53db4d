"""`nybble eval` as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models import make_tiny, to_gguf

NYBBLE = [sys.executable, "-c", "from nybble.cli.app import main; main()"]
pytestmark = pytest.mark.e2e


def nybble_eval(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*NYBBLE, "eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=cwd)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    make_tiny("llama", folder / "tiny")
    for quant in ("Q8_0", "Q4_0"):
        to_gguf(folder / "tiny", folder / f"{quant}.gguf", quant)
    (folder / "text.txt").write_text("the lower and the other one then an end. " * 100, "utf-8")
    return folder


def test_table_page_picture_and_document(here: Path, tmp_path: Path) -> None:
    options = ("--ctx", "64", "--tokens", "256", "--threads", "1")
    outputs = ("--html", tmp_path / "a.html", "--plot", tmp_path / "a.png", "--json")
    models = (here / "Q8_0.gguf", here / "Q4_0.gguf")
    done = nybble_eval(*models, "--against", here / "tiny", "--text", here / "text.txt", *options, *outputs)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "tokens 33 to 63 of each are scored, 124 in all" in " ".join(done.stdout.split())
    document = json.loads(done.stdout.splitlines()[-1])
    q8, q4 = (model["loss"] for model in document["models"])
    assert q8["mean_kl"]["low"] <= q8["mean_kl"]["value"] < q4["mean_kl"]["value"]
    assert document["reference"]["name"] == "tiny"
    assert "<svg" in (tmp_path / "a.html").read_text("utf-8")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.png"]

    again = nybble_eval(*models, "--text", here / "text.txt", *options, *outputs)
    assert again.returncode == 2
    assert "a.html exists already: choose another name, or replace it with --force" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "none.txt"), "the text none.txt cannot be read: No such file"),
        (("--text", "text.txt", "--ctx", "9999"), "tiny reads 512 tokens at most: give a smaller --ctx than 9999"),
        (("--text", "short.txt"), "the text is too short: it has 5 tokens"),
        (("--text", "text.txt", "--against", "nothing"), "no file or folder 'nothing'"),
        (("--text", "text.txt", "--plot", "a.svg"), "let the name end in .png"),
        (("--text", "text.txt", "--plot", "a.png"), "name at least two"),
        (("--text", "text.txt", "--html", "none/a.html"), "the folder none does not exist"),
    ],
)
def test_mistakes_are_one_line(here: Path, arguments: tuple[str, ...], message: str) -> None:
    (here / "short.txt").write_text("short", "utf-8")
    before = sorted(here.iterdir())
    done = nybble_eval("tiny", *arguments, cwd=here)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert sorted(here.iterdir()) == before


def test_without_pillow_a_picture_is_refused_before_any_work(here: Path) -> None:
    hidden = "import sys; sys.modules['PIL'] = None; " + NYBBLE[2]
    command = [sys.executable, "-c", hidden, "eval", "tiny", "Q8_0.gguf", "--text", "text.txt", "--plot", "a.png"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here)
    assert done.returncode == 2
    assert "pip install 'nybble[plot]', or take --html" in done.stderr


def test_ctrl_c_leaves_nothing(here: Path, tmp_path: Path) -> None:
    """The text is a pipe that nobody writes to, so that the command is surely at work when the signal comes."""
    os.mkfifo(tmp_path / "text")
    command = [
        *NYBBLE,
        "eval",
        str(here / "tiny"),
        "--text",
        str(tmp_path / "text"),
        "--html",
        str(tmp_path / "a.html"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not any(tmp_path.glob(".a.html.*")):  # its output is open
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr is not None and process.stderr.read() == ""
    process.stderr.close()
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
