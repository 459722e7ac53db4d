"""Arrays on their way into or out of a safetensors file, with the types that numpy lacks."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble.core.errors import CheckpointError
from nybble.formats.safetensors import SafeTensor

_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1",
    "BF16": "<u2", "F8_E4M3": "|u1",
}  # fmt: skip
_NAMES = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8", "u1": "U8"}


@dataclass(frozen=True, slots=True)
class Stored:
    """An array and the type that a safetensors file calls it. BF16 and F8_E4M3 are held as the bits that they are."""

    dtype: str
    array: npt.NDArray[Any]

    @classmethod
    def of(cls, array: npt.NDArray[Any]) -> Stored:
        """From a numpy array of a type that safetensors has."""
        return cls(_NAMES[array.dtype.str[1:]], np.ascontiguousarray(array))

    @property
    def num_bytes(self) -> int:
        return self.array.nbytes


def read_array(tensor: SafeTensor) -> npt.NDArray[Any]:
    """The tensor's values, a view of the file; BF16 and F8_E4M3 as their bits."""
    view = tensor.file.view[tensor.begin : tensor.end]
    return np.frombuffer(view, _NUMPY[tensor.format.name]).reshape(tensor.shape)


def read_floats(tensor: SafeTensor) -> npt.NDArray[np.floating]:
    """As `read_array`, with BF16 widened to float32. Raises CheckpointError if the tensor holds integers."""
    array, name = read_array(tensor), tensor.format.name
    if name == "BF16":
        return widen_bf16(array)
    if name not in ("F16", "F32"):
        raise CheckpointError(f"{tensor.file.path}: the tensor {tensor.name!r} holds {name}, not scales: it is damaged")
    return array


def widen_bf16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounded to nearest even. NaN stays NaN."""
    wide = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def floats_as(values: npt.NDArray[np.floating], dtype: str) -> Stored:
    """Values in one of F32, F16, BF16."""
    if dtype == "BF16":
        return Stored("BF16", to_bf16(values.astype(np.float32)))
    return Stored(dtype, np.ascontiguousarray(values, _NUMPY[dtype]))


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * np.dtype(_NUMPY[dtype]).itemsize
