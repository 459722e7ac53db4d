"""A disk that fills, and files that may not grow: one sentence, nothing lost, nothing half there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub
from models_on_disk import gguf
from test_hub import CONTENT, hub_server

from nybble.core.errors import StoreError
from nybble.store import Library

__all__ = ["hub_server"]

MEGABYTE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 8 MB, which NYBBLE_HOME is on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root can mount a small disk")
    monkeypatch.setenv("NYBBLE_HOME", str(folder / "home"))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Take all that is free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return filler


def blob(library: Library, size: int) -> str:
    content = b"GGUF" + os.urandom(size)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    library.write_blob(digest, [content[at : at + MEGABYTE] for at in range(0, len(content), MEGABYTE)])
    return digest


def make(library: Library, name: str, text: str, folder: Path, **more: object) -> None:
    library.create(name, text, base_folder=folder, progress=lambda status: None, **more)  # type: ignore[arg-type]


def test_what_was_there_before_the_disk_was_full_stays(disk: Path, tmp_path: Path) -> None:
    library = Library()
    gguf(tmp_path)
    digest = blob(library, MEGABYTE)
    make(library, "sent", "FROM x.gguf", tmp_path, files={"x.gguf": digest})
    make(library, "mine", "FROM model.gguf\nSYSTEM old", tmp_path)
    with pytest.raises(StoreError, match="is full: make room"):
        blob(library, 10 * MEGABYTE)
    filler = fill(disk)
    for attempt in (
        lambda: make(library, "mine", "FROM model.gguf\nSYSTEM new", tmp_path),
        lambda: make(library, "other", "FROM model.gguf", tmp_path),
        lambda: make(library, "small", "FROM sent", tmp_path, quantize=copies),
        lambda: blob(library, 100),
    ):
        with pytest.raises(StoreError, match="is full: make room"):
            attempt()
        assert library.verify() == []
        assert {str(model.name) for model in library.list()} == {"sent:latest", "mine:latest"}
        assert library.get("mine").system == "old"
        assert os.listdir(library.root / "work") == []
    library.remove("sent")  # which makes room
    assert library.blobs.digests() == []
    make(library, "mine", "FROM model.gguf\nSYSTEM new", tmp_path)
    assert library.get("mine").system == "new"
    filler.unlink()
    blob(library, 4 * MEGABYTE)
    assert library.verify() == []


def copies(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def test_a_pull_goes_on_when_there_is_room_again(disk: Path, hub_server: FakeHub) -> None:
    library = Library()
    hub_server.stall = threading.Event()
    failed: list[Exception] = []

    def pull() -> None:
        try:
            library.pull("hf.co/org/Tiny-GGUF", lambda progress: None)
        except StoreError as error:
            failed.append(error)

    pulling = threading.Thread(target=pull)
    pulling.start()
    assert hub_server.halfway.wait(30)
    filler = fill(disk)
    hub_server.stall.set()
    pulling.join(30)
    hub_server.stall = None
    assert "is full: make room" in str(failed[0])
    assert library.list() == [] and library.verify() == []
    filler.unlink()
    library.pull("hf.co/org/Tiny-GGUF", lambda progress: None)
    assert library.get("hf.co/org/Tiny-GGUF").path.read_bytes() == CONTENT
    begins = [int(wanted[6:-1]) for wanted in hub_server.downloads() if wanted]
    assert begins and begins[-1] > 0, "what had come was kept"
    assert library.verify() == []


LIMITED = """
import hashlib, resource, sys
from pathlib import Path
from nybble.core.errors import StoreError
from nybble.store import Library
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
content = b"GGUF" + bytes(200_000)
try:
    Library().write_blob("sha256:" + hashlib.sha256(content).hexdigest(), [content])
except StoreError as error:
    print(error)
"""


def test_a_file_that_may_not_grow(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    make(library, "mine", "FROM model.gguf", tmp_path)
    told = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    assert "cannot be used (File too large)" in told.stdout
    assert library.verify() == []
    assert [str(model.name) for model in library.list()] == ["mine:latest"]
    assert os.listdir(library.root / "work") == []
