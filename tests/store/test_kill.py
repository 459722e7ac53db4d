"""Processes that are killed, and processes that all want the same names at once."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from fake_hub import FakeHub
from models_on_disk import gguf
from test_hub import CONTENT, hub_server

from nybble.store import Library

__all__ = ["hub_server"]

# Everything that writes, over and over, until someone kills it.
WORK = """
import hashlib, itertools, os, sys
from pathlib import Path
from nybble.core.errors import ModelNotFoundError, StoreError
from nybble.store import Library
folder, library, quiet = Path(sys.argv[1]), Library(), lambda message: None
def smaller(source, target):
    target.write_bytes(b"GGUF" + os.urandom(20000))
print("ready", flush=True)
for n in itertools.count():
    content = b"GGUF" + os.urandom(100_000)
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    library.write_blob(digest, [content[:50_000], content[50_000:]])
    try:
        library.create("sent", "FROM x.gguf", base_folder=folder, progress=quiet, files={"x.gguf": digest})
        library.create("linked", "FROM model.gguf", base_folder=folder, progress=quiet)
        library.copy("linked", "copied")
        library.create("small", "FROM linked", base_folder=folder, progress=quiet, quantize=smaller)
        library.remove("copied")
        library.remove("sent")
        library.collect(keep_seconds=-1 if sys.argv[2] == "collect" else 3600)
    except (ModelNotFoundError, StoreError):
        pass
    if len(sys.argv) > 3 and n == int(sys.argv[3]):
        break
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WORK, str(folder), *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_store_verifies_whenever_its_writer_is_killed(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    for delay in random.Random(1).choices(range(1, 60), k=12):
        process = start(tmp_path, "collect")
        time.sleep(delay / 1000)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert library.verify() == []
        for model in library.list():
            assert library.get(str(model.name)).path.read_bytes().startswith(b"GGUF")
    library.collect(keep_seconds=-1)
    used = {model.path.name for model in library.list()}
    assert {digest.replace(":", "-") for digest in library.blobs.digests()} == used
    assert os.listdir(library.root / "work") == []


def test_many_processes_at_once(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    processes = [start(tmp_path, "keep", "15") for _ in range(3)]
    for process in processes:
        _, _ = process.communicate(timeout=60)
        assert process.returncode == 0
    assert library.verify() == []
    assert library.get("linked").path.samefile(tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"GGUFweights"
    found = hashlib.sha256(library.get("small").path.read_bytes()).hexdigest()
    assert library.get("small").path.name == f"sha256-{found}"


# Pulls, makes and removes the same names as others do, over and over.
PULL = """
import itertools, sys
from pathlib import Path
from nybble.core.errors import ModelNotFoundError, StoreError
from nybble.store import Library
from nybble.store.modelfile import ModelfileError
import huggingface_hub.file_download
library, quiet, most = Library(), lambda message: None, int(sys.argv[1])
name = "hf.co/org/Tiny-GGUF"
print("ready", flush=True)
for n in itertools.count():
    steps = [
        lambda: library.pull(name, quiet),
        lambda: library.create("mine", f"FROM {name}", base_folder=Path("/"), progress=quiet),
        lambda: library.copy("mine", "copied"),
        lambda: library.remove(name),
        lambda: library.remove("mine"),
        lambda: library.remove("copied"),
    ]
    for step in steps[:1] if n + 1 == most else steps:
        try:
            step()
        except (ModelNotFoundError, ModelfileError, StoreError) as error:
            told = str(error)
            gone = isinstance(error, ModelNotFoundError) or isinstance(error.__cause__, ModelNotFoundError)
            assert gone or "removing the files" in told, told
    if n + 1 == most:
        break
"""


def start_pulling(count: int) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", PULL, str(count)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_store_verifies_whenever_a_pull_is_killed(library: Library, hub_server: FakeHub) -> None:
    for delay in random.Random(2).choices(range(5, 150), k=6):
        process = start_pulling(-1)
        time.sleep(delay / 1000)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert library.verify() == []
        for model in library.list():
            assert library.get(str(model.name)).path.read_bytes() == CONTENT
    library.pull("hf.co/org/Tiny-GGUF", lambda progress: None)
    assert library.get("hf.co/org/Tiny-GGUF").path.read_bytes() == CONTENT


def test_two_processes_pull_make_and_remove_the_same_names(library: Library, hub_server: FakeHub) -> None:
    processes = [start_pulling(6) for _ in range(2)]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert library.verify() == []
    library.pull("hf.co/org/Tiny-GGUF", lambda progress: None)
    assert library.get("hf.co/org/Tiny-GGUF").path.read_bytes() == CONTENT
    library.collect(keep_seconds=-1)
    used = {model.path.name for model in library.list()}
    assert {digest.replace(":", "-") for digest in library.blobs.digests()} == used
    assert os.listdir(library.root / "partial") == []
