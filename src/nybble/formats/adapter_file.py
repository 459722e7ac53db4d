"""What a file of low-rank factors holds, whatever its container: pairs of matrices by the name of what they change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nybble.core.errors import CheckpointError
from nybble.formats.gguf import GgufTensor
from nybble.formats.mapping import MappedFile
from nybble.formats.safetensors import SafeTensor
from nybble.quant.formats import QuantFormat
from nybble.quant.reference import dequantize

MAX_RANK = 1 << 12


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix in a mapped file, [rows, columns]."""

    name: str
    shape: tuple[int, int]
    format: QuantFormat
    data: memoryview
    file: MappedFile

    def read(self) -> npt.NDArray[np.float32]:
        """Its values. Raises CheckpointError if they are not finite, or in an encoding that has no decoder."""
        try:
            values = dequantize(self.format, self.data).reshape(self.shape)
        except ValueError as error:
            raise CheckpointError(f"{self.file.path}: the tensor {self.name!r} cannot be decoded: {error}") from error
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.file.path}: the tensor {self.name!r} holds NaN or infinity: get it again")
        return values


@dataclass(frozen=True, slots=True)
class FactorPair:
    """W x becomes W x + scale * b (a x): a is [rank, in_features], b [out_features, rank]."""

    a: StoredMatrix
    b: StoredMatrix
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """All pairs of an adapter. architecture: of the model it was made for, where the container says so."""

    path: Path
    container: str  # "gguf" or "peft"
    architecture: str | None
    pairs: Mapping[str, FactorPair]
    contents: tuple[memoryview, ...]  # of all its files: what it is


def matrix(tensor: SafeTensor | GgufTensor, file: MappedFile) -> StoredMatrix:
    """A tensor that must be a matrix of numbers. Raises CheckpointError if it is not."""
    if len(tensor.shape) != 2 or min(tensor.shape) < 1 or tensor.format.name.startswith(("I", "U", "BOOL")):
        raise CheckpointError(
            f"{file.path}: the tensor {tensor.name!r} is {tensor.format.name} of shape {list(tensor.shape)}, not a "
            "matrix of weights: it is not a plain LoRA"
        )
    rows, cols = tensor.shape
    return StoredMatrix(tensor.name, (rows, cols), tensor.format, file.view[tensor.begin : tensor.end], file)


def check_pairs(
    found: Mapping[str, Mapping[str, StoredMatrix]], path: Path
) -> dict[str, tuple[StoredMatrix, StoredMatrix]]:
    """Both factors of every name, of one rank. Raises CheckpointError if one is missing, or they do not fit."""
    if not found:
        raise CheckpointError(f"{path} holds no low-rank factors: it is not a LoRA")
    pairs = {}
    for name, both in found.items():
        if len(both) != 2:
            raise CheckpointError(f"{path}: {name!r} has only one of its two factors: get a complete file")
        a, b = both["a"], both["b"]
        if a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"{path}: the factors of {name!r} have the shapes {list(a.shape)} and {list(b.shape)}, which do not "
                "meet: the file is damaged"
            )
        if a.shape[0] > MAX_RANK:
            raise CheckpointError(f"{path}: {name!r} has the rank {a.shape[0]}, and {MAX_RANK} is the most")
        pairs[name] = a, b
    return pairs
