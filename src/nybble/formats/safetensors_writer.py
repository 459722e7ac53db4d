"""Writes safetensors files one tensor after the other. Specification: the safetensors README.

Sizes follow from shapes and types, so the header is written before the first tensor is made, and a model of any size
needs the memory of one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.formats.output import OutputFile
from nybble.formats.stored import Stored

if TYPE_CHECKING:
    from typing_extensions import Buffer

SHARD_BYTES = 5 * 10**9  # of one file, at most, where a tensor is not larger
_ALIGNMENT = 8
_METADATA = {"format": "pt"}  # transformers refuses files without it


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that will be written. read: its bytes, asked for once."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    read: Callable[[], Buffer]

    @classmethod
    def of(cls, name: str, stored: Stored) -> Entry:
        array = stored.array
        return cls(name, stored.dtype, array.shape, array.nbytes, lambda: array.reshape(-1).view("u1").data)


def write_safetensors(path: Path, entries: Sequence[Entry], *, force: bool = False) -> None:
    """Raises OutputError if the file cannot be written, ValueError if a tensor has another size than it said."""
    with OutputFile(path, force=force) as file:
        file.write(_header(entries))
        for entry in entries:
            view = memoryview(entry.read())
            if view.nbytes != entry.num_bytes:
                raise ValueError(f"{entry.name} has {view.nbytes} bytes instead of {entry.num_bytes}")
            file.write(view)


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": _METADATA}
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.num_bytes],
        }
        at += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_shards(folder: Path, entries: Sequence[Entry], *, max_bytes: int = SHARD_BYTES) -> list[Path]:
    """One `model.safetensors`, or several with their index where they would be larger than `max_bytes`.

    Raises OutputError if a file cannot be written.
    """
    shards = _shards(entries, max_bytes)
    if len(shards) == 1:
        path = folder / "model.safetensors"
        write_safetensors(path, shards[0], force=True)
        return [path]
    paths = [folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        write_safetensors(path, shard, force=True)
    index = {
        "metadata": {"total_size": sum(entry.num_bytes for entry in entries)},
        "weight_map": {entry.name: path.name for path, shard in zip(paths, shards, strict=True) for entry in shard},
    }
    write_json(folder / "model.safetensors.index.json", index)
    return paths


def shards_bytes(entries: Sequence[Entry], *, max_bytes: int = SHARD_BYTES) -> int:
    """Bytes of the files that `write_shards` writes, without their index. Reads no tensor."""
    return sum(len(_header(shard)) + sum(e.num_bytes for e in shard) for shard in _shards(entries, max_bytes))


def _shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Raises OutputError if the file cannot be written."""
    with OutputFile(path, force=True) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8") + b"\n")
