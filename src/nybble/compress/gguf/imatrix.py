"""Importance matrices: the mean square of each input of a matrix, E[x^2], in llama.cpp's GGUF format.

Per tensor NAME there are `NAME.in_sum2` [columns], sums of squares, and `NAME.counts` [1], over how many tokens; more
than one row of them belongs to a mixture of experts. Its older format without GGUF is read, not written.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nybble.core.errors import CheckpointError, ConfigError
from nybble.formats.gguf import GgufFile
from nybble.formats.gguf_writer import GgufWriter, TensorInfo, Value, encode_value
from nybble.formats.output import OutputFile
from nybble.quant.formats import FORMATS
from nybble.quant.reference import dequantize

_F32 = FORMATS["F32"]
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_ENTRIES, _MAX_COLUMNS, _MAX_NAME = 1 << 20, 1 << 24, 1 << 12


class ActivationStats(Protocol):
    """What a decoder tells while it reads calibration text."""

    def add(self, name: str, sums: npt.NDArray[np.float64], count: int) -> None:
        """name: of the matrix in a GGUF file; sums: of the squares of its inputs, over `count` tokens."""


@dataclass(slots=True)
class Entry:
    """Sums of squares per input column (float64 while they are added up) and the tokens that they are over."""

    sums: npt.NDArray[np.float64]
    count: int = 0

    def mean_squares(self) -> npt.NDArray[np.float32]:
        """E[x^2] in single precision, as the quantizer takes it; ones where nothing has been seen."""
        sums = self.sums.astype(np.float32)
        return sums / np.float32(self.count) if self.count else np.ones_like(sums)


@dataclass(slots=True)
class ImportanceMatrix:
    """Entries by tensor name. It is an ActivationStats, so a decoder can fill it."""

    entries: dict[str, Entry] = field(default_factory=dict)
    datasets: tuple[str, ...] = ()
    num_chunks: int = 0
    chunk_size: int = 512

    def add(self, name: str, sums: npt.NDArray[np.float64], count: int) -> None:
        """Raises ConfigError for sums that are not finite, which would spoil every later number."""
        if not np.isfinite(sums).all():
            raise ConfigError(f"the inputs of {name} are not finite: the model or the calibration text is damaged")
        entry = self.entries.setdefault(name, Entry(np.zeros(len(sums))))
        entry.sums += sums
        entry.count += count

    def weights(self, name: str, columns: int) -> npt.NDArray[np.float32] | None:
        """For the encoder; None if the tensor has no entry. Raises ConfigError if its width is another."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        if len(entry.sums) != columns:
            raise ConfigError(
                f"the importance matrix has {len(entry.sums)} numbers for {name}, which has {columns} columns: "
                "it was made for another model"
            )
        return entry.mean_squares()

    def write(self, path: Path, *, force: bool = False) -> None:
        """Raises OutputError."""
        keys: dict[str, Value] = {
            "general.type": "imatrix",
            "imatrix.datasets": list(self.datasets),
            "imatrix.chunk_count": self.num_chunks,
            "imatrix.chunk_size": self.chunk_size,
        }
        tensors: list[tuple[TensorInfo, npt.NDArray[np.float32]]] = []
        for name in sorted(self.entries):
            entry = self.entries[name]
            tensors.append((TensorInfo(name + _SUMS, (1, len(entry.sums)), _F32), entry.sums.astype(np.float32)))
            tensors.append((TensorInfo(name + _COUNTS, (1, 1), _F32), np.array([entry.count], np.float32)))
        with OutputFile(path, force=force) as file:
            encoded = {key: encode_value(value) for key, value in keys.items()}
            writer = GgufWriter(file, encoded, [info for info, _ in tensors])
            for info, values in tensors:
                writer.write(info, values)
            writer.finish()


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Either format. Raises CheckpointError if the file is damaged or not an importance matrix."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror}") from e
    found = _read_gguf(path) if is_gguf else _read_legacy(path)
    if not found.entries:
        raise CheckpointError(f"{path} has no entries: it is not an importance matrix")
    for name, entry in found.entries.items():
        if not np.isfinite(entry.sums).all() or (entry.sums < 0).any() or entry.count < 0:
            raise CheckpointError(f"{path}: the numbers for {name} are not sums of squares: make the file again")
    return found


def _read_gguf(path: Path) -> ImportanceMatrix:
    gguf = GgufFile(path)
    if gguf.metadata.get("general.type") != "imatrix":
        raise CheckpointError(f"{path} is a GGUF file but no importance matrix")
    entries: dict[str, Entry] = {}
    for name in gguf.tensors:
        if not name.endswith(_SUMS):
            continue
        base = name.removesuffix(_SUMS)
        sums, counts = _floats(gguf, name), _floats(gguf, base + _COUNTS)
        if len(counts) != 1:
            raise CheckpointError(f"{path}: {base} has entries for {len(counts)} experts, which is not supported yet")
        entries[base] = Entry(sums.astype(np.float64), int(counts[0]))
    datasets = gguf.metadata.get("imatrix.datasets", ())
    return ImportanceMatrix(
        entries,
        tuple(str(one) for one in datasets)
        if isinstance(datasets, list | tuple) or hasattr(datasets, "__iter__")
        else (),
        _whole(gguf.metadata, "imatrix.chunk_count", 0),
        _whole(gguf.metadata, "imatrix.chunk_size", 512),
    )


def _floats(gguf: GgufFile, name: str) -> npt.NDArray[np.float32]:
    tensor = gguf.tensors.get(name)
    if tensor is None or tensor.format is not _F32:
        raise CheckpointError(f"{gguf.path}: the tensor {name!r} is missing or not F32: make the file again")
    return dequantize(_F32, gguf.data(tensor))


def _whole(metadata: Mapping[str, object], key: str, default: int) -> int:
    value = metadata.get(key, default)
    return value if isinstance(value, int) and value >= 0 else default


def _read_legacy(path: Path) -> ImportanceMatrix:
    """count, then per entry: name, calls, values (means times calls); then chunks and the name of the text."""
    data, at = path.read_bytes(), 0

    def take(layout: str) -> int:
        nonlocal at
        try:
            (value,) = struct.unpack_from(layout, data, at)
        except struct.error:
            raise CheckpointError(f"{path} is neither a GGUF file nor a whole importance matrix") from None
        at += struct.calcsize(layout)
        return int(value)

    def take_bytes(size: int, limit: int) -> bytes:
        nonlocal at
        if not 0 <= size <= limit or at + size > len(data):
            raise CheckpointError(f"{path} is neither a GGUF file nor a whole importance matrix")
        at += size
        return data[at - size : at]

    count = take("<i")
    if not 0 < count <= _MAX_ENTRIES:
        raise CheckpointError(f"{path} is neither a GGUF file nor a whole importance matrix")
    found = ImportanceMatrix()
    for _ in range(count):
        name = take_bytes(take("<i"), _MAX_NAME).decode("utf-8", "replace")
        calls = take("<i")
        values = np.frombuffer(take_bytes(4 * take("<i"), 4 * _MAX_COLUMNS), "<f4")
        found.entries[name] = Entry(values.astype(np.float64), max(calls, 1))
    if at + 8 <= len(data):
        found.num_chunks = max(take("<i"), 0)
        found.datasets = (take_bytes(take("<i"), _MAX_NAME).decode("utf-8", "replace"),)
    return found
