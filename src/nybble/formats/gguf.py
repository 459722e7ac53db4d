"""Reads GGUF files, versions 2 and 3, little endian. Specification: ggml's `docs/gguf.md`.

A file may be hostile: every count, length and offset is checked against the file's size before anything of that size
is made, so memory stays within a small multiple of the header that is really there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.core.errors import CheckpointError
from nybble.formats.mapping import MappedFile
from nybble.formats.string_array import StringArray, find_ends
from nybble.quant.formats import QuantFormat, by_ggml_type

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4  # arrays inside arrays
_MAX_KEY_BYTES = 1 << 16  # the specification's limit
_MAX_NAME_BYTES = 256  # of a tensor; the specification allows 64
_LONGEST_LIST = 1 << 12  # numbers that describe layers come as lists, those that describe tokens as numpy arrays


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies. shape: slowest dimension first, so [out_features, in_features]."""

    name: str
    shape: tuple[int, ...]
    format: QuantFormat
    begin: int
    end: int


class GgufFile:
    """The metadata and tensors of one file. Raises CheckpointError if anything about it is wrong.

    metadata: an array is a list, or where it can be long a StringArray or a numpy array, which are far smaller.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = MappedFile(path)
        reader = _Reader(self.file.view, path)
        num_tensors, num_keys = _read_header(reader)
        self.metadata, self._values = _read_metadata(reader, num_keys)
        self.tensors = _read_tensors(reader, num_tensors, _alignment(self.metadata, path))

    def data(self, tensor: GgufTensor) -> memoryview:
        return self.file.view[tensor.begin : tensor.end]

    def value_bytes(self, key: str) -> bytes:
        """The value of a key as it lies in the file, its type first. Raises KeyError."""
        begin, end = self._values[key]
        return bytes(self.file.view[begin:end])


class _Reader:
    """A cursor that never passes the end of the file."""

    def __init__(self, view: memoryview, path: Path) -> None:
        self.view = view
        self.path = path
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.view) - self.at

    def bad(self, what: str, remedy: str = "the file is truncated or damaged, get it again") -> CheckpointError:
        return CheckpointError(f"{self.path}: at byte {self.at}: {what}; {remedy}")

    def take(self, size: int, what: str) -> memoryview:
        if size > self.left:
            raise self.bad(f"{what} needs {size} bytes but {self.left} are left")
        self.at += size
        return self.view[self.at - size : self.at]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.u64(what)
        if limit is not None and length > limit:
            raise self.bad(f"{what} is {length} bytes long, more than {limit}")
        return str(self.take(length, what), "utf-8", "replace")

    def strings(self, count: int, what: str) -> StringArray:
        """Many strings: a vocabulary has hundreds of thousands, so they are not made here."""
        if count * 8 > self.left:
            raise self.bad(f"{what} claims {count} strings but only {self.left} bytes are left")
        ends = find_ends(self.view, self.at, count)
        if len(ends) < count:
            raise self.bad(f"{what}: string {len(ends)} of {count} passes the end of the file")
        end = int(ends[-1]) if count else self.at
        strings = StringArray(self.view[self.at : end], ends - self.at)
        self.at = end
        return strings

    def value(self, kind: int, what: str) -> object:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what, depth=1)
        if kind not in _SCALARS:
            raise self.bad(f"{what} has the unknown type {kind}")
        return self.scalars(kind, 1, what).item()

    def scalars(self, kind: int, count: int, what: str) -> npt.NDArray[Any]:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)

    def array(self, what: str, depth: int) -> object:
        kind, count = self.u32(what), self.u64(what)
        if kind == _STRING:
            return self.strings(count, what)
        if kind == _ARRAY:
            if depth >= _MAX_DEPTH:
                raise self.bad(f"{what} nests arrays more than {_MAX_DEPTH} deep")
            if count * 12 > self.left:
                raise self.bad(f"{what} claims {count} arrays but only {self.left} bytes are left")
            return [self.array(what, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.bad(f"{what} has elements of the unknown type {kind}")
        numbers = self.scalars(kind, count, what)
        # As Python objects, the scores of a vocabulary would take eight times their size.
        return numbers.tolist() if count <= _LONGEST_LIST else numbers.copy()


def _read_header(reader: _Reader) -> tuple[int, int]:
    if reader.left < 4 or bytes(reader.view[:4]) != b"GGUF":
        raise CheckpointError(f"{reader.path} is not a GGUF file: it does not start with 'GGUF'")
    reader.at = 4
    version = reader.u32("the version")
    if version not in (2, 3):
        if version.to_bytes(4, "little")[::-1] in (b"\2\0\0\0", b"\3\0\0\0"):
            raise CheckpointError(f"{reader.path} is big endian, which nybble does not read: get a little-endian file")
        raise CheckpointError(f"{reader.path} is GGUF version {version}; nybble reads 2 and 3: convert it again")
    num_tensors, num_keys = reader.u64("the tensor count"), reader.u64("the key count")
    if num_tensors * 24 > reader.left or num_keys * 13 > reader.left:
        raise reader.bad(f"it claims {num_tensors} tensors and {num_keys} keys, more than {reader.left} bytes can hold")
    return num_tensors, num_keys


def _read_metadata(reader: _Reader, num_keys: int) -> tuple[dict[str, object], dict[str, tuple[int, int]]]:
    """The values, and where each begins and ends."""
    metadata: dict[str, object] = {}
    spans: dict[str, tuple[int, int]] = {}
    for i in range(num_keys):
        key = reader.string(f"the name of key {i}", _MAX_KEY_BYTES)
        if key in metadata:
            raise reader.bad(f"the key {key[:80]!r} stands twice")
        begin = reader.at
        metadata[key] = reader.value(reader.u32(f"the type of {key[:80]!r}"), f"the value of {key[:80]!r}")
        spans[key] = begin, reader.at
    return metadata, spans


def _alignment(metadata: dict[str, object], path: Path) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, not a power of two: the file is damaged")
    return alignment


def _read_tensors(reader: _Reader, num_tensors: int, alignment: int) -> dict[str, GgufTensor]:
    found: list[tuple[str, tuple[int, ...], QuantFormat, int]] = []
    names: set[str] = set()
    for i in range(num_tensors):
        name = reader.string(f"the name of tensor {i}", _MAX_NAME_BYTES)
        if name in names:
            raise reader.bad(f"the tensor {name!r} stands twice")
        names.add(name)
        found.append((name, *_read_tensor_info(reader, name)))
    data_begin = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, shape, fmt, offset in found:
        if offset % alignment:
            raise reader.bad(f"the tensor {name!r} starts at offset {offset}, not a multiple of {alignment}")
        begin = data_begin + offset
        end = begin + _num_bytes(reader.bad, name, shape, fmt)
        if end > len(reader.view):
            raise CheckpointError(
                f"{reader.path} is truncated: the tensor {name!r} ends at byte {end} but the file has "
                f"{len(reader.view)}; get it again"
            )
        tensors[name] = GgufTensor(name, shape, fmt, begin, end)
    _refuse_overlaps(list(tensors.values()), reader.path)
    return tensors


def _read_tensor_info(reader: _Reader, name: str) -> tuple[tuple[int, ...], QuantFormat, int]:
    num_dims = reader.u32(f"the dimensions of {name!r}")
    if not 1 <= num_dims <= 4:
        raise reader.bad(f"the tensor {name!r} has {num_dims} dimensions")
    shape = tuple(reader.u64(f"the shape of {name!r}") for _ in range(num_dims))[::-1]
    kind = reader.u32(f"the type of {name!r}")
    try:
        fmt = by_ggml_type(kind)
    except KeyError:
        raise reader.bad(
            f"the tensor {name!r} has the unknown encoding {kind}", "quantise the model to a type nybble lists"
        ) from None
    return shape, fmt, reader.u64(f"the offset of {name!r}")


def _num_bytes(bad: Callable[[str], CheckpointError], name: str, shape: tuple[int, ...], fmt: QuantFormat) -> int:
    if min(shape) < 1:
        raise bad(f"the tensor {name!r} has the shape {list(shape)}")
    rows = 1
    for dim in shape[:-1]:
        rows *= dim
    try:
        return rows * fmt.row_bytes(shape[-1])
    except ValueError as e:
        raise bad(f"the tensor {name!r}: {e}") from None


def _refuse_overlaps(tensors: list[GgufTensor], path: Path) -> None:
    tensors.sort(key=lambda tensor: tensor.begin)
    for before, after in pairwise(tensors):
        if before.end > after.begin:
            raise CheckpointError(f"{path}: the tensors {before.name!r} and {after.name!r} overlap, get the file again")
