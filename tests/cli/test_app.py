"""The process as a user meets it: exit codes, one line for each error, quiet pipes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nybble import __version__
from nybble.cli.app import COMMANDS

NYBBLE = [sys.executable, "-c", "from nybble.cli.app import main; main()"]


def nybble(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*NYBBLE, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_version() -> None:
    done = nybble("--version")
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")


def test_help_lists_every_command() -> None:
    done = nybble("--help")
    assert done.returncode == 0
    assert all(f" {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = nybble(command, "--help")
    assert done.returncode == 0
    assert f"nybble {command}" in done.stdout.replace("-c", "nybble")


def test_bench_help_defines_the_roofline() -> None:
    assert "roofline_fraction = max(" in " ".join(nybble("bench", "--help").stdout.split())


@pytest.mark.parametrize("arguments", [["run", "--no-such-flag"], ["run"], ["no-such-command"], ["bench", "-p", "x"]])
def test_a_wrong_command_line_leaves_with_2(arguments: list[str]) -> None:
    done = nybble(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["run", "show", "bench"])
def test_an_unknown_model_is_one_line(command: str) -> None:
    done = nybble(command, "no-such-model")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "smollm2:135m" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["-b", "1,x"], "whole numbers"), (["-b", "0"], "at least one"), (["-p", "0", "-n", "0"], "nothing to measure")],
)
def test_a_benchmark_of_nothing(arguments: list[str], message: str) -> None:
    done = nybble("bench", "model", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_closed_pipe_is_quiet() -> None:
    with subprocess.Popen([*NYBBLE, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["doctor"]])
def test_a_full_disk_under_the_output_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*NYBBLE, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


def test_no_output_at_all_is_no_error() -> None:
    command = f'"{sys.executable}" -c "from nybble.cli.app import main; main()" --version >&-'
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
