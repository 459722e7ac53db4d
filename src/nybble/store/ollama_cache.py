"""Models that Ollama has on this machine, read in place: nothing of them is copied, changed or removed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nybble.core.env import ollama_models
from nybble.core.errors import ConfigError, ModelNotFoundError, StoreError
from nybble.store.manifest import MAX_BYTES, StoredModel
from nybble.store.modelfile import PARAMETERS, Value
from nybble.store.names import HUB_HOSTS, ModelName, parse_digest

_REGISTRY = "registry.ollama.ai"
_LIBRARY = "library"
_MEDIA = "application/vnd.ollama.image."


def find_in_ollama(name: ModelName) -> StoredModel | None:
    """A model of Ollama's by the name that Ollama gives it; None if it has none.

    Raises:
        StoreError: its files are damaged or incomplete.
    """
    for folder in ollama_models():
        for path in _manifests(folder):
            if _name(folder, path) == name:
                return _read(folder, path, name)
    return None


def list_ollama() -> list[StoredModel]:
    """All models of Ollama's that can be read."""
    found = []
    for folder in ollama_models():
        for path in _manifests(folder):
            name = _name(folder, path)
            try:
                if name is not None:
                    found.append(_read(folder, path, name))
            except StoreError:
                continue
    return found


def _manifests(folder: Path) -> Iterator[Path]:
    root = folder / "manifests"
    try:
        yield from (path for path in sorted(root.glob("*/*/*/*")) if path.is_file())
    except OSError:
        return  # another user's


def _name(folder: Path, path: Path) -> ModelName | None:
    host, namespace, model, tag = path.relative_to(folder / "manifests").parts
    parts = [host, namespace, model]
    if host == _REGISTRY:
        parts = [model] if namespace == _LIBRARY else [namespace, model]
    elif host not in HUB_HOSTS:
        return None
    try:
        return ModelName.parse(f"{'/'.join(parts)}:{tag}")
    except ModelNotFoundError:
        return None


def _read(folder: Path, path: Path, name: ModelName) -> StoredModel:
    try:
        content = _small(path)
        rows = json.loads(content)
        layers = rows["layers"]
        by_kind: dict[str, list[Path]] = {}
        size = 0
        for layer in layers:
            kind = str(layer["mediaType"]).removeprefix(_MEDIA)
            blob = folder / "blobs" / f"sha256-{parse_digest(layer['digest'])}"
            by_kind.setdefault(kind, []).append(blob)
            size += int(layer["size"])
        texts = {kind: [_text(blob) for blob in by_kind.get(kind, ())] for kind in ("template", "system", "license")}
        params = json.loads(_text(by_kind["params"][0])) if by_kind.get("params") else {}
        messages = json.loads(_text(by_kind["messages"][0])) if by_kind.get("messages") else []
        config = json.loads(_text(folder / "blobs" / f"sha256-{parse_digest(rows['config']['digest'])}"))
        if config.get("renderer"):  # Ollama's own code writes the prompts; the template says nothing then
            texts["template"] = []
        weights = by_kind["model"][0]
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} is gone")
        return StoredModel(
            name=name,
            path=weights,
            digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
            size=size,
            modified=path.stat().st_mtime,
            template=_last(texts["template"]),
            system=_last(texts["system"]),
            parameters=_parameters(params),
            messages=tuple((str(message["role"]), str(message["content"])) for message in messages),
            license=tuple(texts["license"]),
            adapters=tuple(by_kind.get("adapter", ())),
            origin="ollama",
        )
    except (OSError, ValueError, KeyError, IndexError, TypeError, ConfigError, RecursionError) as error:
        raise StoreError(f"{name} of Ollama cannot be read ({error}): pull it again with Ollama") from error


def _small(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes")
    return path.read_bytes()


def _text(path: Path) -> str:
    return _small(path).decode("utf-8")


def _last(texts: list[str]) -> str | None:
    return texts[-1] if texts else None


def _parameters(rows: Mapping[str, Any]) -> dict[str, Value]:
    """Those that nybble knows."""
    return {
        name: list(map(str, value)) if isinstance(value, list) else value
        for name, value in rows.items()
        if name in PARAMETERS and isinstance(value, int | float | str | list)
    }
