"""Writes GGUF files, version 3, one tensor after the other. Specification: ggml's `docs/gguf.md`.

    magic, version, counts | keys | tensor infos | padding | tensor 0 | padding | tensor 1 | padding ...

What is written is known before the first tensor is made, because sizes follow from shapes and types; so a model of any
size needs the memory of one tensor.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nybble.formats.output import OutputFile
from nybble.quant.formats import QuantFormat

if TYPE_CHECKING:
    from typing_extensions import Buffer

ALIGNMENT = 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64 = 4, 5, 6, 7, 8, 9, 10
_ARRAY_KINDS = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}

Value = bool | int | float | str | Sequence[str] | npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor that will be written. shape: slowest dimension first, so [out_features, in_features]."""

    name: str
    shape: tuple[int, ...]
    format: QuantFormat

    @property
    def num_weights(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_weights // self.shape[-1] * self.format.row_bytes(self.shape[-1])


def encode_value(value: Value) -> bytes:
    """A value with its type in front. Whole numbers are 32 bits wide where they fit, other numbers always.

    Raises ValueError for a number that does not fit 64 bits, TypeError for anything that GGUF has no type for.
    """
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        if not -(1 << 31) <= value < 1 << 64:
            raise ValueError(f"{value} does not fit a GGUF key")
        kind, code = (_I32, "i") if value < 0 else (_U32, "I") if value < 1 << 32 else (_U64, "Q")
        return struct.pack(f"<I{code}", kind, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
        code = f"{array.dtype.kind}{array.dtype.itemsize}"
        if code not in _ARRAY_KINDS or array.ndim != 1:
            raise TypeError(f"GGUF has no arrays of {array.dtype} with {array.ndim} dimensions")
        return struct.pack("<IIQ", _ARRAY, _ARRAY_KINDS[code], len(array)) + array.tobytes()
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    raise TypeError(f"GGUF has no type for {type(value).__name__}")


def _string(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


class GgufWriter:
    """Declared tensors are written with `write`, in the order in which they were declared.

    keys: name -> value as `encode_value` or `GgufFile.value_bytes` gives it.
    """

    def __init__(self, file: OutputFile, keys: Mapping[str, bytes], tensors: Sequence[TensorInfo]) -> None:
        self._file = file
        self._left = list(reversed(tensors))
        file.write(header(keys, tensors))

    def write(self, info: TensorInfo, data: Buffer | npt.NDArray[Any]) -> None:
        """Raises ValueError if it is not this tensor's turn or the data has another size."""
        if not self._left or self._left[-1] != info:
            raise ValueError(f"it is not the turn of {info.name}")
        view = data.data if isinstance(data, np.ndarray) else memoryview(data)
        size = view.nbytes
        if size != info.num_bytes:
            raise ValueError(f"{info.name} has {size} bytes instead of {info.num_bytes}")
        self._left.pop()
        self._file.write(view)
        self._file.write(bytes(-size % ALIGNMENT))

    def finish(self) -> None:
        """Raises ValueError if tensors are missing."""
        if self._left:
            raise ValueError(f"{len(self._left)} tensors have not been written")


def header(keys: Mapping[str, bytes], tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the first tensor."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys))]
    for key, value in keys.items():
        parts += [_string(key), value]
    offset = 0
    for info in tensors:
        dims = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
        parts += [_string(info.name), dims, struct.pack("<IQ", _ggml_type(info), offset)]
        offset += info.num_bytes + -info.num_bytes % ALIGNMENT
    data = b"".join(parts)
    return data + bytes(-len(data) % ALIGNMENT)


def file_bytes(keys: Mapping[str, bytes], tensors: Sequence[TensorInfo]) -> int:
    """The size of the file that would be written."""
    return len(header(keys, tensors)) + sum(info.num_bytes + -info.num_bytes % ALIGNMENT for info in tensors)


def _ggml_type(info: TensorInfo) -> int:
    if info.format.ggml_type is None:
        raise ValueError(f"{info.name}: GGUF has no type {info.format.name}")
    return info.format.ggml_type
