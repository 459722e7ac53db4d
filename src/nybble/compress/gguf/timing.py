"""How long writing a GGUF file will take, about: some rows of one tensor of each kind are encoded here for a moment."""

from __future__ import annotations

import time

import numpy as np

from nybble import _native
from nybble.compress.gguf.imatrix import ImportanceMatrix
from nybble.compress.gguf.source import SourceTensor
from nybble.compress.gguf.write import Plan, encode
from nybble.formats.gguf_writer import TensorInfo

_WEIGHTS = 1 << 21  # of a sample


def expected_seconds(plan: Plan, imatrix: ImportanceMatrix | None, threads: int | None) -> float:
    """Of encoding and copying; what the disk takes is not known. Raises CheckpointError for a NaN in a sample."""
    encoder = _native.Encoder(threads=threads)
    rates: dict[tuple[str, str], float] = {}
    total = 0.0
    for tensor, info in zip(plan.source.tensors, plan.targets, strict=True):
        kind = (tensor.info.format.name, info.format.name)
        if kind not in rates:
            rates[kind] = _seconds_per_weight(encoder, tensor, info, imatrix, plan)
        total += rates[kind] * info.num_weights
    return total


def _seconds_per_weight(
    encoder: _native.Encoder, tensor: SourceTensor, info: TensorInfo, imatrix: ImportanceMatrix | None, plan: Plan
) -> float:
    columns = info.shape[-1]
    whole, rows = info.num_weights // columns, max(1, _WEIGHTS // columns)
    rows = min(rows, whole)
    data = tensor.read()
    part = data[: len(data) // whole * rows]
    small = TensorInfo(info.name, (rows, columns), info.format)
    source = SourceTensor(TensorInfo(info.name, (rows, columns), tensor.info.format), lambda: part, lambda: None)
    weights = None if imatrix is None else imatrix.weights(info.name, columns)
    seconds = 0.0
    for _ in range(2):  # the second run counts: the first reads from the disk
        began = time.perf_counter()
        if source.info.format is small.format:
            np.frombuffer(part, np.uint8).copy()
        else:
            encode(encoder, source, small, weights, plan.source.path)
        seconds = time.perf_counter() - began
    tensor.release()
    return seconds / small.num_weights
