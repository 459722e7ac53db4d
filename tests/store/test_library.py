"""Making, finding, copying and removing models: what each leaves on the disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from models_on_disk import gguf

from nybble.core.errors import ConfigError, ModelNotFoundError, StoreError
from nybble.store import Library, ModelfileError, StoredModel, blobs, layers, resolve
from nybble.store.blobs import locked
from nybble.store.modelfile import parse_modelfile

pytestmark = pytest.mark.unit


def create(library: Library, name: str, text: str, folder: Path, **options: object) -> StoredModel:
    said: list[str] = []
    return library.create(name, text, base_folder=folder, progress=said.append, **options)  # type: ignore[arg-type]


def files_of(library: Library) -> set[str]:
    return {str(path.relative_to(library.root)) for path in library.root.rglob("*") if path.is_file()} - {"lock"}


def test_create_links_the_file_and_reads_nothing(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = gguf(tmp_path)
    with source.open("r+b") as file:
        file.truncate(1 << 33)  # 8 GiB of nothing
    model = create(library, "big", "FROM ./model.gguf\nSYSTEM short", tmp_path)
    assert model.path.samefile(source)
    assert model.size == 1 << 33
    assert (model.system, model.parent, str(model.name)) == ("short", None, "big:latest")
    source.unlink()
    assert library.get("big").path.stat().st_size == 1 << 33


def test_the_same_file_is_linked_once(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    first = create(library, "one", "FROM model.gguf", tmp_path)
    second = create(library, "two", "FROM model.gguf", tmp_path)
    third = create(library, "three", f"FROM {first.path}", tmp_path)
    assert first.path == second.path == third.path
    assert len(library.blobs.digests()) == 1


def test_where_links_are_impossible_the_path_is_kept(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(layers.os, "link", refuse)
    source = gguf(tmp_path)
    assert create(library, "one", "FROM model.gguf", tmp_path).path == source
    source.write_bytes(b"GGUF other")
    with pytest.raises(StoreError, match="was changed since"):
        library.get("one")
    assert [sentence for sentence in library.verify() if "was changed since" in sentence]
    source.unlink()
    with pytest.raises(StoreError, match="is gone"):
        library.get("one")


def test_a_linked_file_that_is_changed_is_noticed(library: Library, tmp_path: Path) -> None:
    source = gguf(tmp_path)
    create(library, "one", "FROM model.gguf", tmp_path)
    assert library.verify() == []
    before = source.stat()
    source.write_bytes(b"GGUFWEIGHTS")
    with pytest.raises(StoreError, match="was changed since"):
        library.get("one")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if a disk had changed it
    assert library.get("one")
    assert "is damaged" in library.verify()[0]


def test_a_model_inherits(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    create(
        library,
        "parent",
        "FROM model.gguf\nSYSTEM a\nPARAMETER top_k 3\nPARAMETER top_p 0.5\nMESSAGE user x\nLICENSE MIT\n"
        "TEMPLATE {{ .Prompt }}",
        tmp_path,
    )
    child = create(library, "child", "FROM Parent\nPARAMETER top_k 4\nSYSTEM b\nLICENSE other", tmp_path)
    assert child.parameters == {"top_k": 4, "top_p": 0.5}
    assert (child.system, child.template, child.parent) == ("b", "{{ .Prompt }}", "parent:latest")
    assert (child.messages, child.license) == ((("user", "x"),), ("MIT", "other"))


def test_show_modelfile_makes_the_same_model(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    text = 'FROM model.gguf\nSYSTEM """ two\nlines """\nPARAMETER stop a b\nPARAMETER stop c\nPARAMETER use_mmap true\n'
    text += "PARAMETER temperature 0.1\nMESSAGE user hi\nMESSAGE assistant yo\nLICENSE MIT\nTEMPLATE {{ .Prompt }}"
    first = create(library, "one", text, tmp_path)
    second = create(library, "two", first.modelfile(), tmp_path)
    assert first.digest == second.digest
    assert parse_modelfile(first.modelfile()).parameters["stop"] == ["a b", "c"]


def test_names_have_one_model_whatever_their_case(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    create(library, "Model:Small", "FROM model.gguf\nSYSTEM 1", tmp_path)
    create(library, "model:small", "FROM model.gguf\nSYSTEM 2", tmp_path)
    assert [str(model.name) for model in library.list()] == ["model:small"]
    assert library.get("MODEL:SMALL").system == "2"
    assert resolve("MODEL:small") == library.get("model:small").path


def test_copy_and_remove(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    one = create(library, "one", "FROM model.gguf", tmp_path)
    library.copy("one", "me/two:v1")
    two = library.get("me/two:v1")
    assert (two.path, two.digest) == (one.path, one.digest)
    library.remove("one")
    assert two.path.exists()
    library.remove("me/two:V1")
    assert files_of(library) == set()
    assert (tmp_path / "model.gguf").exists()
    for name in ("one", "never"):
        with pytest.raises(ModelNotFoundError, match="no model of that name"):
            library.remove(name)
    with pytest.raises(ModelNotFoundError):
        library.copy("one", "three")


def test_list_is_newest_first(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    for age, name in ((30, "old"), (20, "middle"), (10, "new")):
        create(library, name, "FROM model.gguf", tmp_path)
        os.utime(library.root / "manifests" / f"{name}@latest", (1e9 - age, 1e9 - age))
    assert [model.name.path for model in library.list()] == ["new", "middle", "old"]
    assert library.list()[0].modified == 1e9 - 10


def test_blobs_are_checked(library: Library, tmp_path: Path) -> None:
    content = b"GGUF from the network"
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert not library.has_blob(digest)
    with pytest.raises(ConfigError, match="send them again"):
        library.write_blob(digest, [b"other bytes"])
    assert files_of(library) == set()
    library.write_blob(digest, [content[:3], content[3:]])
    assert library.has_blob(digest)
    model = create(library, "sent", "FROM x.gguf", tmp_path, files={"x.gguf": digest})
    assert model.path.read_bytes() == content
    assert library.verify() == []
    model.path.write_bytes(b"GGUF from the netw0rk")
    assert "is damaged" in library.verify()[0]
    for action in (library.has_blob, lambda digest: library.write_blob(digest, [])):
        with pytest.raises(ConfigError, match="is not a digest"):
            action("sha256:../../x")


def test_a_text_from_the_network_sees_no_paths(library: Library, tmp_path: Path) -> None:
    source = gguf(tmp_path)
    for text in (f"FROM {source}", "FROM ./model.gguf", "FROM model.gguf", f"FROM {tmp_path}", "FROM ~/x"):
        with pytest.raises(ModelfileError, match="line 1, column 6"):
            create(library, "x", text, tmp_path, files={})
    missing = f"sha256:{'0' * 64}"
    with pytest.raises(ConfigError, match="is not here: send it first"):
        create(library, "x", "FROM a.gguf", tmp_path, files={"a.gguf": missing})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM ./no.gguf", "line 1, column 6: there is no file"),
        ("FROM no-such-parent", "line 1, column 6: no file or folder 'no-such-parent', and no model"),
        ("FROM text.txt", "is not a GGUF file: it begins with b'hell'"),
        ("FROM .", "without config.json"),
        ("FROM a\0b", "line 1, column 6"),
        (f"FROM {'x' * 5000}", "line 1, column 6"),
        ("FROM model.gguf\nADAPTER no.gguf", "line 2, column 9: there is no file 'no.gguf'"),
        ("FROM model.gguf\nADAPTER text.txt", "is no adapter"),
        ("FROM model.gguf\nTEMPLATE {{ .Prompt | upper }}", "line 2, column 10: .*upper is not supported"),
        ("FROM model.gguf\nTEMPLATE {% if %}", "line 2, column 10: the template is not valid Jinja"),
        ("FROM pipe", "is not a regular file"),
    ],
)
def test_what_cannot_be_made(library: Library, tmp_path: Path, text: str, message: str) -> None:
    gguf(tmp_path)
    (tmp_path / "text.txt").write_text("hello")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((ConfigError, ModelNotFoundError), match=message):
        create(library, "x", text, tmp_path)
    assert library.list() == []


def test_adapters_are_looked_at_and_kept(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    header = json.dumps({"model.layers.0.q.lora_A.weight": {}}).encode()
    (tmp_path / "lora.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "other.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    model = create(library, "tuned", "FROM model.gguf\nADAPTER lora.safetensors", tmp_path)
    assert [path.samefile(tmp_path / "lora.safetensors") for path in model.adapters] == [True]
    with pytest.raises(ConfigError, match="has an adapter"):
        resolve("tuned")
    with pytest.raises(ConfigError, match="no tensor of it is called lora_"):
        create(library, "bad", "FROM model.gguf\nADAPTER other.safetensors", tmp_path)


def test_quantised_weights_become_a_blob(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)

    def quantize(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:6])

    model = create(library, "small", "FROM model.gguf", tmp_path, quantize=quantize)
    assert model.path.name == f"sha256-{hashlib.sha256(b'GGUFwe').hexdigest()}"
    assert model.path.read_bytes() == b"GGUFwe"


def test_a_safetensors_folder_stays_where_it_is(library: Library, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert create(library, "folder", "FROM ./folder", tmp_path).path == folder


def test_gc_keeps_what_is_used_or_new(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    create(library, "one", "FROM model.gguf", tmp_path)
    digest = f"sha256:{hashlib.sha256(b'sent').hexdigest()}"
    library.write_blob(digest, [b"sent"])
    dead = library.root / "work" / "dead"
    dead.mkdir()
    (dead / "blob").write_bytes(b"half")
    half = library.root / "partial" / "half"
    half.parent.mkdir()
    half.write_bytes(b"half")
    with library.blobs.workspace() as alive:
        assert library.collect() == (0, 4)
        assert alive.exists()
    assert library.has_blob(digest)
    assert not dead.exists()
    assert not half.exists()
    assert library.collect(keep_seconds=-1) == (1, 4)
    assert library.verify() == []
    assert library.get("one")


def test_a_damaged_manifest_hides_no_other_model(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    create(library, "good", "FROM model.gguf", tmp_path)
    create(library, "bad", "FROM model.gguf", tmp_path)
    manifest = library.root / "manifests" / "bad@latest"
    for content in (b"", b"{}", b"[1]", b'{"version": 1, "weights": {"size": -1}}', b"[" * 100_000, b"\xff"):
        manifest.write_bytes(content)
        assert [model.name.path for model in library.list()] == ["good"]
        with pytest.raises(StoreError, match="is damaged"):
            library.get("bad")
        assert len(library.verify()) == 1
        with pytest.raises(StoreError, match="is damaged"):
            library.collect()
    hostile = {"version": 1, "weights": {"size": 1, "digest": "sha256:../../../etc/passwd"}}
    manifest.write_text(json.dumps(hostile))
    with pytest.raises((StoreError, ConfigError)):
        library.get("bad")
    assert [model.name.path for model in library.list()] == ["good"]
    library.remove("bad")
    assert library.get("good").path.exists()


def test_a_link_in_the_store_is_not_followed(library: Library, tmp_path: Path) -> None:
    gguf(tmp_path)
    model = create(library, "one", "FROM model.gguf", tmp_path)
    model.path.unlink()
    model.path.symlink_to(tmp_path / "model.gguf")
    with pytest.raises(StoreError):
        library.get("one")
    (library.root / "manifests" / "evil@latest").symlink_to("/etc/passwd")
    with pytest.raises(StoreError):
        library.get("evil")


def test_a_full_disk_loses_nothing(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf(tmp_path)
    create(library, "one", "FROM model.gguf\nSYSTEM 1", tmp_path)
    before = files_of(library)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(blobs.os, "fsync", full)
    with pytest.raises(StoreError, match="is full: make room"):
        create(library, "one", "FROM model.gguf\nSYSTEM 2", tmp_path)
    with pytest.raises(StoreError, match="is full: make room"):
        library.write_blob(f"sha256:{hashlib.sha256(b'x').hexdigest()}", [b"x"])
    assert files_of(library) == before
    assert library.get("one").system == "1"


def test_an_error_of_whoever_sends_passes_and_leaves_nothing(library: Library) -> None:
    def broken() -> Iterator[bytes]:
        yield b"x"
        raise ConnectionResetError("gone")

    with pytest.raises(ConnectionResetError):
        library.write_blob(f"sha256:{hashlib.sha256(b'x').hexdigest()}", broken())
    assert files_of(library) == set()


def test_the_lock_goes_with_its_holder(library: Library) -> None:
    with pytest.raises(ValueError, match="stop"), locked(library.root):
        raise ValueError("stop")
    with locked(library.root):
        pass
