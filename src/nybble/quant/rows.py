"""From weights as the safetensors dialects mean them to the rows of blocks that kernels are packed from."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.quant.codebook import pack_codebook
from nybble.quant.float8 import pack_float8
from nybble.quant.formats import FORMATS, QuantFormat
from nybble.quant.grouped import pack_grouped
from nybble.quant.weights import Codebook4, GroupedInt, PackedWeight, RowInt8

Rows = tuple[QuantFormat, npt.NDArray[np.uint8]]


def to_rows(weight: PackedWeight) -> Rows:
    """The matrix in an encoding that has kernels, and its rows of bytes.

    Integers, codebooks and FP8 keep their codes. What no kernel has is kept in 16 bits, or 32 where those do not hold
    it: groups whose inputs are scattered over the row (act-order), groups that are not multiples of 32 weights, scales
    outside of float16.
    """
    try:
        if isinstance(weight, GroupedInt):
            return _grouped(weight)
        if isinstance(weight, Codebook4):
            return pack_codebook(weight.table, weight.codes, weight.absmax, weight.block)
        if isinstance(weight, RowInt8):
            return _row_int8(weight)
        return pack_float8(weight.codes, weight.scales, weight.block)
    except ValueError:
        pass
    return _floats(weight.decode())


def _grouped(weight: GroupedInt) -> Rows:
    columns = np.arange(weight.codes.shape[1], dtype=np.int32)
    if weight.g_idx is not None and not np.array_equal(weight.g_idx, columns // weight.group_size):
        raise ValueError("the groups are scattered")
    zeros = weight.zeros
    if zeros is None:
        zeros = np.full(weight.scales.shape, 1 << (weight.bits - 1), np.int16)
    return pack_grouped(weight.codes, weight.scales, zeros, bits=weight.bits)


def _row_int8(weight: RowInt8) -> Rows:
    codes = (weight.codes.view(np.uint8) ^ np.uint8(0x80)).astype(np.uint8)
    scales = (weight.absmax / np.float32(127)).reshape(-1, 1)
    return pack_grouped(codes, scales, np.full(scales.shape, 128, np.int16), bits=8)


def _floats(values: npt.NDArray[np.float32]) -> Rows:
    largest = float(np.abs(values).max(initial=0.0))
    name, dtype = ("F16", np.float16) if largest < 65504 else ("F32", np.float32)
    stored = np.ascontiguousarray(values, dtype)
    return FORMATS[name], stored.view(np.uint8).reshape(len(values), -1)
