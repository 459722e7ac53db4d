"""From weights as the safetensors dialects mean them to the rows of blocks that kernels are packed from."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nybble.quant.codebook import pack_codebook
from nybble.quant.float8 import pack_float8
from nybble.quant.formats import FORMATS, QuantFormat
from nybble.quant.grouped import pack_grouped
from nybble.quant.weights import Codebook4, GroupedInt, PackedWeight, RowInt8


class Rows(NamedTuple):
    """A matrix as kernels are packed from it. order: int32 [in], which input each column is of; None: its own."""

    format: QuantFormat
    data: npt.NDArray[np.uint8]
    order: npt.NDArray[np.int32] | None = None


def to_rows(weight: PackedWeight) -> Rows:
    """The matrix in an encoding that has kernels, and its rows of bytes.

    Integers, codebooks and FP8 keep their codes. Where groups are scattered over the inputs (act-order), the columns
    are brought together, and the inputs must be put into the same order. What no kernel has is kept as `float_rows`:
    groups of unequal size, or of no multiple of 32 weights, and scales outside of float16.
    """
    try:
        if isinstance(weight, GroupedInt):
            return _grouped(weight)
        if isinstance(weight, Codebook4):
            return Rows(*pack_codebook(weight.table, weight.codes, weight.absmax, weight.block))
        if isinstance(weight, RowInt8):
            return _row_int8(weight)
        return Rows(*pack_float8(weight.codes, weight.scales, weight.block))
    except ValueError:
        return float_rows(weight)


def float_rows(weight: PackedWeight) -> Rows:
    """The matrix in 16 bits, or in 32 where those do not hold it."""
    values = weight.decode()
    largest = float(np.abs(values).max(initial=0.0))
    name, dtype = ("F16", np.float16) if largest < 65504 else ("F32", np.float32)
    stored = np.ascontiguousarray(values, dtype)
    return Rows(FORMATS[name], stored.view(np.uint8).reshape(len(values), -1))


def _grouped(weight: GroupedInt) -> Rows:
    weight, order = _together(weight)
    zeros = weight.zeros
    if zeros is None:
        zeros = np.full(weight.scales.shape, 1 << (weight.bits - 1), np.int16)
    return Rows(*pack_grouped(weight.codes, weight.scales, zeros, bits=weight.bits), order)


def _together(weight: GroupedInt) -> tuple[GroupedInt, npt.NDArray[np.int32] | None]:
    """The columns of a group next to each other, and the input of each; None where they lie so already."""
    if weight.g_idx is None:
        return weight, None
    groups = weight.scales.shape[1]
    if not np.array_equal(np.bincount(weight.g_idx, minlength=groups), np.full(groups, weight.group_size)):
        raise ValueError("the groups have different sizes")
    order = np.argsort(weight.g_idx, kind="stable").astype(np.int32)
    if np.array_equal(order, np.arange(len(order))):
        return weight, None
    return replace(weight, codes=np.ascontiguousarray(weight.codes[:, order]), g_idx=None), order


def _row_int8(weight: RowInt8) -> Rows:
    codes = (weight.codes.view(np.uint8) ^ np.uint8(0x80)).astype(np.uint8)
    scales = (weight.absmax / np.float32(127)).reshape(-1, 1)
    return Rows(*pack_grouped(codes, scales, np.full(scales.shape, 128, np.int16), bits=8))
