"""What may become part of a path, and what may not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.core.errors import ConfigError, ModelNotFoundError, NybbleError
from nybble.store import Library, ModelName
from nybble.store.blobs import BlobFolder
from nybble.store.names import from_file_name, parse_digest

pytestmark = pytest.mark.unit

GOOD = {
    "smollm2:135m": "smollm2:135m",
    "llama3": "llama3:latest",
    "me/my_model:v1.2": "me/my_model:v1.2",
    "hf.co/Org/Repo": "hf.co/Org/Repo:latest",
    "huggingface.co/Org/Repo:Q4_K_M": "hf.co/Org/Repo:Q4_K_M",
    "HF.co/Org/Repo:sub/file-Q8_0.gguf": "hf.co/Org/Repo:sub/file-Q8_0.gguf",
}
BAD = (
    "", ".", "..", "../x", "a/../b", "/etc/passwd", "~/x", "a//b", "a/b/c/d", "a:", ":a", "a:b:c", "a b", "a\nb",
    "a\0b", "modèle", "\uff41", "a\u202eb", "a\\b", "-rf", ".hidden", "a..b", "a:../../b", "a:b/c", "hf.co/a",
    "hf.co/a/b/c", "a@b", "a,b", "x" * 256, "a%2e%2e", "\ud800",
)  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), GOOD.items())
def test_good_names_have_one_form(text: str, expected: str) -> None:
    name = ModelName.parse(text)
    assert str(name) == expected
    assert from_file_name(name.file_name) == name


@pytest.mark.parametrize("text", BAD)
def test_bad_names_are_one_sentence(text: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        ModelName.parse(text)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_upper_and_lower_case_are_the_same_name() -> None:
    assert ModelName.parse("Llama3:8B") == ModelName.parse("llama3:8b")
    assert len({ModelName.parse("Llama3:8B"), ModelName.parse("llama3:8b")}) == 1


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:" + "a" * 63, "sha256:" + "A" * 64, "md5:" + "a" * 64, "sha256:" + "/" * 64,
               "sha256:../../../../etc/passwd", "sha256:" + "a" * 64 + "\n", "inode:" + "a" * 63]
)  # fmt: skip
def test_what_is_no_digest_is_refused(digest: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a digest"):
        BlobFolder(tmp_path).path(digest)


def test_a_digest_may_be_written_in_two_ways() -> None:
    assert parse_digest("sha256:" + "a" * 64) == parse_digest("sha256-" + "a" * 64)


@given(st.text(max_size=300) | st.sampled_from(BAD))
def test_no_name_leads_out_of_the_store(text: str) -> None:
    folder = Path("/somewhere/manifests")
    try:
        name = ModelName.parse(text)
    except ModelNotFoundError:
        return
    path = folder / name.file_name
    assert Path(os.path.normpath(path)).parent == folder
    assert len(name.file_name.encode()) <= 255


@given(st.text(max_size=100))
def test_no_digest_leads_out_of_the_store(text: str) -> None:
    blobs = BlobFolder(Path("/somewhere"))
    for digest in (text, f"sha256:{text}", f"inode:{text}", f"sha256-{text}"):
        try:
            path = blobs.path(digest)
        except ConfigError:
            continue
        assert Path(os.path.normpath(path)).parent == blobs.folder


@given(st.text(max_size=80) | st.sampled_from(BAD))
def test_a_hostile_name_touches_nothing(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    root = tmp_path_factory.mktemp("outer")
    (root / "kept").write_text("here before")
    library = Library(root / "store")
    for action in (
        library.get,
        library.remove,
        lambda name: library.copy(name, "x"),
        lambda name: library.copy("x", name),
    ):
        with pytest.raises(NybbleError):
            action(text)
    assert {path.name for path in root.iterdir()} <= {"kept", "store"}
    assert (root / "kept").read_text() == "here before"
