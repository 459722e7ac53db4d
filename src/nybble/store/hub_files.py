"""Which file of a Hugging Face repository a name means, and where the hub's own cache has it on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nybble.core.env import hub_cache
from nybble.core.errors import ModelNotFoundError
from nybble.store.names import DEFAULT_TAG, ModelName

_PREFERRED = ("Q4_K_M", "Q4_0", "Q8_0", "F16", "BF16")  # without a tag
_SPLIT = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}")
FOLDER_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*")


def choose_file(name: ModelName, files: Iterable[str]) -> str | None:
    """The file that a name means; None: the repository is a folder of safetensors, to be used whole.

    Raises:
        ModelNotFoundError: there is no such file, or more than one.
    """
    files = sorted(files)
    models = [file for file in files if file.lower().endswith(".gguf")]
    if name.tag == DEFAULT_TAG:
        return _choose_default(name, files, models)
    exact = [file for file in models if file.lower() in (name.tag.lower(), f"{name.tag.lower()}.gguf")]
    found = exact or _of_type(models, name.tag)
    if not found:
        raise ModelNotFoundError(f"{name.repository} has no GGUF file {name.tag!r}; it has {_listed(models or files)}")
    return _only(name, found)


def _choose_default(name: ModelName, files: Sequence[str], models: Sequence[str]) -> str | None:
    if models:
        for kind in _PREFERRED:
            if found := _of_type(models, kind):
                return _only(name, found)
        return _only(name, models)
    if "config.json" in files and any(file.endswith(".safetensors") for file in files):
        return None
    raise ModelNotFoundError(f"{name.repository} has neither GGUF nor safetensors files; it has {_listed(files)}")


def _of_type(models: Sequence[str], kind: str) -> list[str]:
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(kind)}(?=[-./])", re.IGNORECASE)
    return [file for file in models if pattern.search(file) and "mmproj" not in file.lower()]


def _only(name: ModelName, found: Sequence[str]) -> str:
    if any(_SPLIT.search(file) for file in found):
        raise ModelNotFoundError(f"{found[0]} of {name.repository} is split into parts: choose a file that is whole")
    if len(found) > 1:
        raise ModelNotFoundError(f"{name} could mean {_listed(found)}: write the file's name after the colon")
    return found[0]


def _listed(files: Sequence[str]) -> str:
    return ", ".join(files[:12]) + (", ..." if len(files) > 12 else "") or "nothing"


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A model in the hub's cache. path: the file, or the folder of a snapshot."""

    name: ModelName
    path: Path


def find_cached(name: ModelName) -> CachedFile | None:
    """A model of the hub that other programs have downloaded already; None if it is not all here."""
    snapshot = _snapshot(_repository_folder(name.repository))
    if snapshot is None:
        return None
    try:
        file = choose_file(name, _files(snapshot))
    except ModelNotFoundError:
        return None
    path = snapshot if file is None else snapshot / file
    return CachedFile(name, path) if path.exists() else None


def list_cached() -> list[CachedFile]:
    """All GGUF files in the hub's cache."""
    found = []
    for folder in sorted(hub_cache().glob("models--*--*")):
        repository = folder.name.removeprefix("models--").replace("--", "/", 1)
        snapshot = _snapshot(folder)
        for file in _files(snapshot) if snapshot is not None else ():
            if not file.lower().endswith(".gguf") or _SPLIT.search(file) or "mmproj" in file.lower():
                continue
            try:
                name = ModelName.parse(f"hf.co/{repository}:{file}")
            except ModelNotFoundError:
                continue
            found.append(CachedFile(name, snapshot / file if snapshot else folder))
    return found


def _repository_folder(repository: str) -> Path | None:
    wanted = "models--" + repository.replace("/", "--")
    exact = hub_cache() / wanted
    if exact.is_dir():
        return exact
    for folder in hub_cache().glob("models--*"):
        if folder.name.lower() == wanted.lower():
            return folder
    return None


def _snapshot(folder: Path | None) -> Path | None:
    """The files of the branch main, as it was when they were downloaded."""
    if folder is None:
        return None
    try:
        commit = (folder / "refs" / "main").read_text("ascii").strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if _COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def _files(snapshot: Path) -> list[str]:
    return [
        os.path.relpath(Path(folder) / file, snapshot)
        for folder, _, files in os.walk(snapshot)
        for file in files
        if (Path(folder) / file).is_file()  # a link whose download never ended is none
    ]
