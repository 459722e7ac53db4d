"""What a killed process, Ctrl-C, a full disk and one that cannot be written leave behind: nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from folder_helpers import Notes, calibrated, run

from models import make_tiny
from nybble.core.errors import ConfigError, OutputError
from nybble.formats.gguf import GgufFile

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

# The command line, sending itself a signal in the middle of a write: of the second layer's file, or a GGUF file's
# second tensor.
_SCRIPT = """
import os, signal, sys
from nybble.cli.app import main
from nybble.formats.output import OutputFile
write, seen = OutputFile.write, 0
def interrupted(self, data):
    global seen
    seen += self.path.name == "layer-0001.safetensors" or self.path.suffix == ".gguf"
    if seen == 3:
        os.kill(os.getpid(), signal.{name})
    write(self, data)
OutputFile.write = interrupted
main()
"""


def killed(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    script = _SCRIPT.format(name=name)
    command = [sys.executable, "-c", script, "quantize", *map(str, arguments), "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_killed_run_goes_on_at_the_last_finished_layer(llama: Path, text: Path, tmp_path: Path, name: str) -> None:
    target, whole = tmp_path / "out", tmp_path / "whole"
    options = ["--calibrate", text, "--calibration-samples", "16", "--calibration-tokens", "64"]
    done = killed(name, llama, target, "--to", "gptq-4bit", *options)
    assert done.returncode == {"SIGKILL": -signal.SIGKILL, "SIGINT": 130}[name], done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.part"]
    progress = Notes()
    run(llama, target, "gptq-4bit", progress, **calibrated(text))
    assert "1 of 2 layers are finished already, from an earlier run" in progress.notes
    run(llama, whole, "gptq-4bit", **calibrated(text))
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_an_interrupted_gguf_file_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    done = killed("SIGINT", llama, tmp_path / "m.gguf", "--to", "Q4_0")
    assert done.returncode == 130, done.stderr
    assert not list(tmp_path.iterdir())
    done = killed("SIGKILL", llama, tmp_path / "m.gguf", "--to", "Q4_0")
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "m.gguf").exists()
    run(llama, tmp_path / "m.gguf", "Q4_0")
    assert GgufFile(tmp_path / "m.gguf").tensors


@contextmanager
def mounted(folder: Path, size_kib: int) -> Iterator[Path]:
    """A small disk. Only root can have one."""
    folder.mkdir()
    options = f"size={size_kib}k"
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder]).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("to", ["Q8_0", "int8", "nf4", "gptq-4bit"])
def test_a_full_disk_is_one_sentence(llama: Path, text: Path, tmp_path: Path, to: str) -> None:
    options = calibrated(text) if to == "gptq-4bit" else {}
    # gptq: there is room for the stream of activations, not for the layers.
    size = 1800 if to == "gptq-4bit" else 300
    with mounted(tmp_path / "disk", size) as disk:
        target = disk / ("m.gguf" if to == "Q8_0" else "out")
        with pytest.raises(OutputError, match=r"(disk|no room).*"):
            run(llama, target, to, **options)
        assert not target.exists()
        assert {path.name for path in disk.iterdir()} <= {".out.part"}  # what is finished may be taken up again
        assert not list(disk.glob(".out.part/.*"))


def test_a_disk_that_fills_up_can_be_cleared_and_the_run_goes_on(llama: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 1024) as disk:
        (disk / "other").write_bytes(b"x" * 600_000)
        with pytest.raises(OutputError, match="does not fit on the disk"):
            run(llama, disk / "out", "int8")
        (disk / "other").unlink()
        run(llama, disk / "out", "int8")
        run(llama, tmp_path / "whole", "int8")
        assert [path.name for path in disk.iterdir()] == ["out"]
        written = (disk / "out" / "model.safetensors").read_bytes()
        assert written == (tmp_path / "whole" / "model.safetensors").read_bytes()


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """Root may write into folders whatever their mode is, but not on a disk that is mounted so."""
    if os.geteuid():
        folder.mkdir(mode=0o555)
        yield folder
        folder.chmod(0o755)
        return
    with mounted(folder, 64):
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield folder


@pytest.mark.parametrize("to", ["Q8_0", "int8"])
def test_a_folder_that_cannot_be_written_is_one_sentence(llama: Path, tmp_path: Path, to: str) -> None:
    with read_only(tmp_path / "disk") as disk:
        target = disk / ("m.gguf" if to == "Q8_0" else "out")
        with pytest.raises(OutputError, match=r"cannot be written: (Read-only file system|Permission denied)"):
            run(llama, target, to)
        assert not list(disk.iterdir())


@pytest.mark.parametrize(
    ("to", "sizes", "message"),
    [
        ("gptq-3bit", {"hidden_size": 80, "intermediate_size": 96}, "80 x 80 weights does not fill: use --to int3"),
        ("awq-4bit", {"intermediate_size": 100}, "the 100 of model.layers.0.mlp.gate_proj are not: use --to int4"),
    ],
)
def test_widths_that_a_layout_cannot_pack_are_refused(
    tmp_path: Path, to: str, sizes: dict[str, int], message: str
) -> None:
    model = make_tiny("llama", tmp_path / "model", **sizes)
    with pytest.raises(ConfigError, match=message):
        run(model, tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
