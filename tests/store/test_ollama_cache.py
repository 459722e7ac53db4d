"""Ollama's own models: read where they are, and left alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from nybble.core.errors import StoreError
from nybble.store import Library, resolve

pytestmark = pytest.mark.unit


def blob(folder: Path, content: bytes) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "blobs" / f"sha256-{digest}").write_bytes(content)
    return {"digest": f"sha256:{digest}", "size": len(content)}


def ollama_model(folder: Path, where: str, *, config: dict[str, object] | None = None, **layers: bytes) -> Path:
    rows = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", **blob(folder, body)} for kind, body in layers.items()
    ]
    manifest = folder / "manifests" / where
    manifest.parent.mkdir(parents=True, exist_ok=True)
    content = {"schemaVersion": 2, "config": blob(folder, json.dumps(config or {}).encode()), "layers": rows}
    manifest.write_text(json.dumps(content))
    return manifest


@pytest.fixture
def ollama(tmp_path: Path) -> Path:
    folder = tmp_path / "ollama"
    params = {"temperature": 0.1, "stop": ["a"], "unheard_of": 1}
    ollama_model(
        folder,
        "registry.ollama.ai/library/llama3.2/1b",
        model=b"GGUF llama",
        template=b"{{ .Prompt }}",
        system=b"be good",
        params=json.dumps(params).encode(),
        messages=json.dumps([{"role": "user", "content": "hi"}]).encode(),
        license=b"a licence",
    )
    ollama_model(
        folder, "registry.ollama.ai/me/mine/latest", model=b"GGUF mine", template=b"x", config={"renderer": "q"}
    )
    ollama_model(folder, "hf.co/Org/Repo-GGUF/Q8_0", model=b"GGUF hub")
    return folder


def test_models_are_found_by_the_names_that_ollama_gives(library: Library, ollama: Path) -> None:
    assert {str(model.name) for model in library.list()} == {
        "llama3.2:1b",
        "me/mine:latest",
        "hf.co/Org/Repo-GGUF:Q8_0",
    }
    model = library.get("llama3.2:1b")
    assert model.path.read_bytes() == b"GGUF llama"
    assert (model.origin, model.template, model.system) == ("ollama", "{{ .Prompt }}", "be good")
    assert model.parameters == {"temperature": 0.1, "stop": ["a"]}
    assert (model.messages, model.license) == ((("user", "hi"),), ("a licence",))
    assert library.get("me/mine").template is None  # Ollama's own code writes its prompts
    assert resolve("hf.co/org/repo-gguf:q8_0").read_bytes() == b"GGUF hub"


def test_they_are_used_in_place_and_never_removed(library: Library, ollama: Path) -> None:
    before = sorted(path for path in ollama.rglob("*"))
    with pytest.raises(StoreError, match="`ollama rm`"):
        library.remove("llama3.2:1b")
    library.create("mine", "FROM llama3.2:1b\nSYSTEM new", base_folder=ollama, progress=lambda message: None)
    model = library.get("mine")
    assert (model.system, model.template, model.parent) == ("new", "{{ .Prompt }}", "llama3.2:1b")
    assert model.path.is_relative_to(ollama)
    library.remove("mine")
    library.collect(keep_seconds=-1)
    assert sorted(path for path in ollama.rglob("*")) == before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '{"layers": 3, "config": {}}',
        '{"layers": [{"mediaType": 1, "digest": "sha256:../x", "size": 1}]}',
    ],
)
def test_damaged_manifests_are_one_sentence_and_hide_nothing(library: Library, ollama: Path, content: str) -> None:
    (ollama / "manifests/registry.ollama.ai/library/llama3.2/1b").write_text(content)
    with pytest.raises(StoreError, match="pull it again with Ollama"):
        library.get("llama3.2:1b")
    assert len(library.list()) == 2


def test_a_missing_blob_is_said(library: Library, ollama: Path) -> None:
    library.get("llama3.2:1b").path.unlink()
    with pytest.raises(StoreError, match="is gone"):
        library.get("llama3.2:1b")
