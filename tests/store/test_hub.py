"""Pulling from the hub: whole, interrupted, corrupted, redirected, refused."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, running

from nybble.core.errors import ModelNotFoundError, StoreError
from nybble.store import CatalogEntry, Library, ModelName, PullProgress, catalog, hub, resolve
from nybble.store.hub_files import choose_file

CONTENT = b"GGUF" + bytes(range(256)) * 20_000  # 5 MB: larger than what sockets hold
DIGEST = hashlib.sha256(CONTENT).hexdigest()
FILES = {"tiny-Q4_K_M.gguf": CONTENT, "tiny-Q8_0.gguf": b"GGUF eight", "README.md": b"read me"}


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants, hf_api

    server = FakeHub(repositories={"org/Tiny-GGUF": dict(FILES)})
    with running(server):
        # huggingface_hub reads its environment when it is imported, which another test may have done.
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_api.constants, "ENDPOINT", server.url)
        yield server


def pull(library: Library, name: str) -> list[PullProgress]:
    told: list[PullProgress] = []
    library.pull(name, told.append)
    return told


def test_a_file_becomes_a_blob(library: Library, hub_server: FakeHub) -> None:
    told = pull(library, "hf.co/org/Tiny-GGUF")
    model = library.get("hf.co/org/tiny-gguf")
    assert model.path == library.blobs.path(f"sha256:{DIGEST}")
    assert model.path.read_bytes() == CONTENT
    assert str(model.name) == "hf.co/org/Tiny-GGUF:latest"
    assert {progress.completed for progress in told} >= {None, len(CONTENT)}
    assert [progress.status for progress in told][-2:] == ["writing manifest", "success"]
    assert library.verify() == []
    pull(library, "hf.co/org/Tiny-GGUF:Q4_K_M")
    assert hub_server.downloads() == [None]  # the second name needed no second download


def test_the_type_or_the_file_may_be_named(library: Library, hub_server: FakeHub) -> None:
    for tag in ("q8_0", "tiny-Q8_0.gguf", "tiny-q8_0"):
        assert resolve(f"hf.co/org/Tiny-GGUF:{tag}").read_bytes() == b"GGUF eight"
    with pytest.raises(ModelNotFoundError, match=r"has no GGUF file 'Q2_K'; it has tiny-Q4_K_M.gguf, tiny-Q8_0.gguf"):
        library.pull("hf.co/org/Tiny-GGUF:Q2_K", lambda progress: None)


def test_a_lost_connection_goes_on_where_it_was(
    library: Library, hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub_server.cut = [1_000_000, 2_000_000]
    pull(library, "hf.co/org/Tiny-GGUF")
    assert library.get("hf.co/org/Tiny-GGUF").path.read_bytes() == CONTENT
    begins = [int(wanted[6:-1]) for wanted in hub_server.downloads() if wanted]
    assert len(begins) == 2
    assert 0 < begins[0] < begins[1]


def test_a_killed_pull_goes_on_where_it_was(library: Library, hub_server: FakeHub) -> None:
    import threading

    hub_server.stall = threading.Event()
    command = "from nybble.store import Library; Library().pull('hf.co/org/Tiny-GGUF', lambda progress: None)"
    process = subprocess.Popen([sys.executable, "-c", command])
    assert hub_server.halfway.wait(30)
    partial = library.root / "partial" / DIGEST
    deadline = time.monotonic() + 30
    while (not partial.exists() or partial.stat().st_size < 1_000_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub_server.stall.set()
    hub_server.stall = None
    assert library.verify() == []
    assert library.list() == []
    begun = partial.stat().st_size
    pull(library, "hf.co/org/Tiny-GGUF")
    assert hub_server.downloads()[-1] == f"bytes={begun}-"
    assert library.get("hf.co/org/Tiny-GGUF").path.read_bytes() == CONTENT
    assert not partial.exists()


def test_what_arrives_damaged_is_deleted(library: Library, hub_server: FakeHub) -> None:
    hub_server.damaged = True
    with pytest.raises(StoreError, match=r"arrived with SHA-256 .* it was deleted: pull it again"):
        pull(library, "hf.co/org/Tiny-GGUF")
    assert library.blobs.digests() == []
    assert list((library.root / "partial").iterdir()) == []
    hub_server.damaged = False
    pull(library, "hf.co/org/Tiny-GGUF")
    assert library.verify() == []


def test_a_redirect_is_followed_without_the_token(
    library: Library, hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub_server.redirect = True
    pull(library, "hf.co/org/Tiny-GGUF")
    assert library.get("hf.co/org/Tiny-GGUF").path.read_bytes() == CONTENT
    assert set(hub_server.seen_tokens) == {None}


def test_what_the_hub_refuses(library: Library, hub_server: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match=r"the hub has no org/other"):
        pull(library, "hf.co/org/other")
    hub_server.gated = True
    with pytest.raises(StoreError, match="is gated: accept its terms"):
        pull(library, "hf.co/org/Tiny-GGUF")
    hub_server.repositories["org/empty"] = {"README.md": b""}
    with pytest.raises(ModelNotFoundError, match="neither GGUF nor safetensors"):
        pull(library, "hf.co/org/empty")


def test_no_network_is_one_sentence(library: Library, hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, hf_api

    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(hf_api.constants, "ENDPOINT", nobody)
    with pytest.raises(StoreError, match="could not be fetched from the hub") as caught:
        pull(library, "hf.co/org/Tiny-GGUF")
    assert "\n" not in str(caught.value)


def test_too_little_room_is_said_before_the_download(
    library: Library, hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = hub.shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(StoreError, match="make room"):
        pull(library, "hf.co/org/Tiny-GGUF")
    assert hub_server.downloads() == []


def test_the_catalog_may_name_a_file_of_the_hub(
    library: Library, hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = CatalogEntry("tiny:1b", "", (), DIGEST, len(CONTENT), "org/Tiny-GGUF", "tiny-Q4_K_M.gguf")
    monkeypatch.setitem(catalog(), entry.name, entry)
    assert resolve("tiny:1b").read_bytes() == CONTENT
    wrong = CatalogEntry("tiny:2b", "", (), "0" * 64, len(CONTENT), "org/Tiny-GGUF", "tiny-Q4_K_M.gguf")
    monkeypatch.setitem(catalog(), wrong.name, wrong)
    with pytest.raises(StoreError, match="not the catalog's"):
        resolve("tiny:2b")


def test_a_folder_of_safetensors_goes_to_the_hubs_cache(
    library: Library, hub_server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"tensors", "pytorch_model.bin": b"pickle"}
    hub_server.repositories["org/folder"] = files
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *args, **kwargs: str(cache(tmp_path, "folder", files))
    )
    pull(library, "hf.co/org/folder")
    assert library.get("hf.co/org/folder").path == cache_folder(tmp_path, "folder") / "snapshots" / COMMIT
    blob = cache_folder(tmp_path, "folder") / "blobs" / hashlib.sha256(b"tensors").hexdigest()
    blob.write_bytes(b"tensorz")
    with pytest.raises(StoreError, match="is damaged"):
        pull(library, "hf.co/org/folder")


def cache_folder(tmp_path: Path, name: str) -> Path:
    return tmp_path / "huggingface" / "hub" / f"models--org--{name}"


def cache(tmp_path: Path, name: str, files: dict[str, bytes]) -> Path:
    """What another program downloaded before."""
    folder = cache_folder(tmp_path, name)
    snapshot = folder / "snapshots" / COMMIT
    for path in (snapshot, folder / "blobs", folder / "refs"):
        path.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for file, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        if not blob.exists():
            blob.write_bytes(content)
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / file).symlink_to(os.path.relpath(blob, (snapshot / file).parent))
    return snapshot


def test_what_the_hubs_cache_has_is_used_in_place(library: Library, tmp_path: Path) -> None:
    snapshot = cache(tmp_path, "Tiny-GGUF", FILES)
    (snapshot / "never-Q2_K.gguf").symlink_to("../../blobs/absent")
    assert (
        resolve("hf.co/org/tiny-gguf:Q8_0")
        == cache_folder(tmp_path, "Tiny-GGUF") / "snapshots" / COMMIT / "tiny-Q8_0.gguf"
    )
    listed = {str(model.name): model.origin for model in library.list()}
    assert listed == {
        "hf.co/org/Tiny-GGUF:tiny-Q4_K_M.gguf": "huggingface",
        "hf.co/org/Tiny-GGUF:tiny-Q8_0.gguf": "huggingface",
    }
    with pytest.raises(StoreError, match="cache of another program"):
        library.remove("hf.co/org/Tiny-GGUF:Q8_0")
    library.copy("hf.co/org/Tiny-GGUF:Q8_0", "mine")
    assert library.get("mine").path.read_bytes() == b"GGUF eight"
    library.remove("mine")
    assert (snapshot / "tiny-Q8_0.gguf").exists()


def test_a_pull_links_what_the_hubs_cache_has(library: Library, hub_server: FakeHub, tmp_path: Path) -> None:
    snapshot = cache(tmp_path, "Tiny-GGUF", FILES)
    pull(library, "hf.co/org/Tiny-GGUF")
    assert library.get("hf.co/org/Tiny-GGUF").path.samefile(snapshot / "tiny-Q4_K_M.gguf")
    assert hub_server.downloads() == []


@pytest.mark.unit
@pytest.mark.parametrize(
    ("tag", "files", "expected"),
    [
        ("latest", ["a-Q8_0.gguf", "a-Q4_K_M.gguf"], "a-Q4_K_M.gguf"),
        ("latest", ["a-IQ3_M.gguf"], "a-IQ3_M.gguf"),
        ("latest", ["config.json", "model.safetensors"], None),
        ("Q8_0", ["a.Q8_0.gguf", "mmproj-a-Q8_0.gguf"], "a.Q8_0.gguf"),
        ("Q4_K", ["a-Q4_K.gguf", "a-Q4_K_M.gguf"], "a-Q4_K.gguf"),
        ("Q6_K/a-Q6_K.gguf", ["Q6_K/a-Q6_K.gguf"], "Q6_K/a-Q6_K.gguf"),
    ],
)
def test_which_file_is_meant(tag: str, files: list[str], expected: str | None) -> None:
    assert choose_file(ModelName.parse(f"hf.co/org/a:{tag}"), files) == expected


@pytest.mark.unit
@pytest.mark.parametrize(
    ("tag", "files", "message"),
    [
        ("latest", ["a-IQ3_M.gguf", "b-IQ3_M.gguf"], "could mean a-IQ3_M.gguf, b-IQ3_M.gguf"),
        ("Q8_0", ["a-Q8_0-00001-of-00002.gguf", "a-Q8_0-00002-of-00002.gguf"], "split into parts"),
        ("Q8_0", [], "it has nothing"),
    ],
)
def test_which_file_is_not_clear(tag: str, files: list[str], message: str) -> None:
    with pytest.raises(ModelNotFoundError, match=message):
        choose_file(ModelName.parse(f"hf.co/org/a:{tag}"), files)
