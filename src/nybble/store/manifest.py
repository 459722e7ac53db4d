"""What the store knows about a model: one JSON file each, and how the model looks to the rest of nybble."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nybble.core.errors import StoreError
from nybble.store.modelfile import Command, Value, format_modelfile
from nybble.store.names import BLOB_DIGEST, ModelName

MAX_BYTES = 1 << 24  # of a manifest; licences are the longest part
VERSION = 1
Origin = Literal["nybble", "ollama", "huggingface"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A file of a model: a blob by its digest, or a file or folder outside the store by its path.

    size, mtime_ns and inode are what it had when the model was made, 0 where they do not matter: a file whose content
    is not known by its digest must not have changed since.
    """

    size: int
    digest: str | None = None  # sha256:... or inode:...
    path: str | None = None
    mtime_ns: int = 0
    inode: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """A model as it is written down."""

    weights: Layer
    adapters: tuple[Layer, ...] = ()
    template: str | None = None
    system: str | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    license: tuple[str, ...] = ()
    parent: str | None = None

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All its files."""
        return (self.weights, *self.adapters)

    def to_bytes(self) -> bytes:
        """The file's content; the same for equal models."""
        rows: dict[str, object] = {"version": VERSION, "weights": _layer_row(self.weights)}
        if self.adapters:
            rows["adapters"] = [_layer_row(layer) for layer in self.adapters]
        for name in ("template", "system", "parent"):
            if getattr(self, name) is not None:
                rows[name] = getattr(self, name)
        for name, value in (
            ("parameters", dict(self.parameters)),
            ("messages", self.messages),
            ("license", self.license),
        ):
            if value:
                rows[name] = value
        return json.dumps(rows, indent=1).encode("ascii")


def parse_manifest(content: bytes, where: Path) -> Manifest:
    """The reverse of `Manifest.to_bytes`. Raises StoreError if the file is something else."""
    try:
        rows = json.loads(content)
        if rows["version"] != VERSION:
            raise StoreError(f"{where} was written by another version of nybble: create the model again")
        return Manifest(
            weights=_layer(rows["weights"]),
            adapters=tuple(_layer(row) for row in rows.get("adapters", ())),
            template=_text_or_none(rows.get("template")),
            system=_text_or_none(rows.get("system")),
            parameters={_text(name): _value(value) for name, value in rows.get("parameters", {}).items()},
            messages=tuple((_text(role), _text(content)) for role, content in rows.get("messages", ())),
            license=tuple(_text(one) for one in rows.get("license", ())),
            parent=_text_or_none(rows.get("parent")),
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreError(f"{where} is damaged ({error}): remove the model and pull or create it again") from error


def _layer_row(layer: Layer) -> dict[str, object]:
    rows = {"digest": layer.digest, "path": layer.path, "size": layer.size}
    if layer.mtime_ns:
        rows |= {"mtime_ns": layer.mtime_ns, "inode": layer.inode}
    return {name: value for name, value in rows.items() if value is not None}


def _layer(row: Mapping[str, Any]) -> Layer:
    layer = Layer(
        size=_whole(row["size"]),
        digest=_text_or_none(row.get("digest")),
        path=_text_or_none(row.get("path")),
        mtime_ns=_whole(row.get("mtime_ns", 0)),
        inode=_whole(row.get("inode", 0)),
    )
    if (layer.digest is None) == (layer.path is None):
        raise ValueError("a file has neither digest nor path, or both")
    if layer.digest is not None and not BLOB_DIGEST.fullmatch(layer.digest):
        raise ValueError(f"{layer.digest!r:.100} is not a digest")
    if layer.path is not None and not layer.path.startswith("/"):
        raise ValueError(f"{layer.path!r:.100} is not an absolute path")
    return layer


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r:.40} is not a size")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is not a text")
    return value


def _text_or_none(value: object) -> str | None:
    return None if value is None else _text(value)


def _value(value: object) -> Value:
    if isinstance(value, int | float | str):
        return value
    if isinstance(value, list):
        return [_text(one) for one in value]
    raise ValueError(f"{value!r:.40} is not a parameter")


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that has a name on this machine.

    path: the GGUF file or Hugging Face folder to open. digest: of its manifest. size: of its files, in bytes.
    modified: seconds since 1970. origin: whose files they are; what is not nybble's is read in place and never changed.
    template: Jinja or Go (see nybble.store.go_template); None: what the model file brings.
    """

    name: ModelName
    path: Path
    digest: str
    size: int
    modified: float
    template: str | None = None
    system: str | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    license: tuple[str, ...] = ()
    adapters: tuple[Path, ...] = ()
    parent: str | None = None
    origin: Origin = "nybble"

    def modelfile(self) -> str:
        """A Modelfile that makes the same model.

        Raises:
            ConfigError: a text of the model cannot be written in a Modelfile.
        """
        head = f"# To make a model based on this one, replace the line FROM with:\n# FROM {self.name}\n\n"
        return head + format_modelfile(self.commands(str(self.path)))

    def commands(self, source: str) -> list[Command]:
        """The lines of its Modelfile, with `source` after FROM."""
        lines = [Command("FROM", source)]
        lines += [Command("ADAPTER", str(path)) for path in self.adapters]
        if self.template is not None:
            lines.append(Command("TEMPLATE", self.template))
        if self.system is not None:
            lines.append(Command("SYSTEM", self.system))
        for name, value in self.parameters.items():
            values: Sequence[Value] = value if isinstance(value, list) else [value]
            lines += [Command("PARAMETER", _written(one), name) for one in values]
        lines += [Command("MESSAGE", content, role) for role, content in self.messages]
        lines += [Command("LICENSE", text) for text in self.license]
        return lines


def _written(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)
