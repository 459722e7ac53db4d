"""Reads Hugging Face folders: config.json and safetensors files, one or sharded.

Specification: the safetensors README: 8 bytes of header length, a JSON header, then the data. The header is parsed
here, not with the library, because tensors must stay views of one mapping whose pages can be given back.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeGuard

from nybble.core.errors import CheckpointError
from nybble.formats.mapping import MappedFile
from nybble.quant.formats import FORMATS, QuantFormat

_MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """Where a tensor lies: its file, and the bytes in it."""

    name: str
    shape: tuple[int, ...]
    format: QuantFormat
    file: MappedFile
    begin: int
    end: int


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file. Raises CheckpointError if it is missing, too large or not one."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON_BYTES} bytes: it is not what its name says")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the folder is not a complete model") from None
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return value


def read_folder(folder: Path) -> tuple[dict[str, SafeTensor], list[MappedFile]]:
    """All tensors of `model.safetensors` or of the shards that its index names, and the files they are in.

    Raises CheckpointError if a file is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    names = [single.name] if single.exists() or not index.exists() else _shards(index)
    files: list[MappedFile] = []
    tensors: dict[str, SafeTensor] = {}
    for name in names:
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing: the folder is not a complete model")
        file = MappedFile(path)
        files.append(file)
        for tensor in _read_header(file):
            if tensor.name in tensors:
                raise CheckpointError(f"{path}: the tensor {tensor.name!r} stands twice: the folder is damaged")
            tensors[tensor.name] = tensor
    return tensors, files


def read_file(path: Path) -> list[SafeTensor]:
    """All tensors of one safetensors file. Raises CheckpointError if it is damaged."""
    return _read_header(MappedFile(path))


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: get it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not name or Path(name).name != name or name.startswith("."):
            raise CheckpointError(f"{index} names the file {name!r}, which is not in its own folder: do not use it")
    return names


def _read_header(file: MappedFile) -> list[SafeTensor]:
    damaged = "the file is truncated or damaged, get it again"
    if file.size < 8:
        raise CheckpointError(f"{file.path} has only {file.size} bytes: {damaged}")
    length = int.from_bytes(file.view[:8], "little")
    if length > min(file.size - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(f"{file.path}: its header claims {length} bytes of {file.size}: {damaged}")
    try:
        header = json.loads(bytes(file.view[8 : 8 + length]))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file.path}: its header is not valid JSON: {damaged}") from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.path}: its header is not a JSON object: {damaged}")
    found = [_tensor(file, 8 + length, name, entry) for name, entry in header.items() if name != "__metadata__"]
    found.sort(key=lambda tensor: tensor.begin)
    for before, after in pairwise(found):
        if before.end > after.begin:
            raise CheckpointError(f"{file.path}: the tensors {before.name!r} and {after.name!r} overlap: {damaged}")
    return found


def _tensor(file: MappedFile, data_begin: int, name: str, entry: object) -> SafeTensor:
    where = f"{file.path}: the tensor {name!r}"
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise CheckpointError(f"{where} is not described by a shape and two offsets: the file is damaged, get it again")
    fmt = FORMATS.get(str(dtype))
    if fmt is None or fmt.block_size != 1:
        raise CheckpointError(f"{where} has the type {dtype!r}, which nybble does not read: convert it to BF16")
    size = fmt.block_bytes
    for dim in shape:
        size *= dim
    begin, end = data_begin + offsets[0], data_begin + offsets[1]
    if end - begin != size or end > file.size:
        raise CheckpointError(
            f"{where} of shape {shape} needs {size} bytes, has {end - begin}, in a file of {file.size}: "
            "the file is truncated or damaged, get it again"
        )
    return SafeTensor(name, tuple(shape), fmt, file, begin, end)


def _whole_numbers(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
