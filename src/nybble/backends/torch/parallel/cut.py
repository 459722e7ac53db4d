"""Parts of stored matrices, cut without decoding them wherever no block or group of weights is cut through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nybble.checkpoint import Tensor
from nybble.quant.formats import FORMATS
from nybble.quant.weights import Codebook4, Float8, GroupedInt, PackedWeight, RowInt8


def rows_of(tensor: Tensor, begin: int, end: int) -> Tensor:
    """Rows [begin, end) of a matrix, or these entries of a vector."""
    shape = (end - begin, *tensor.shape[1:])
    read = tensor.packed
    if read is not None:
        weight = read()
        try:
            part = weight.rows(begin, end)
        except ValueError:  # a block would be cut
            return float_tensor(tensor.name, weight.decode()[begin:end])
        return replace(tensor, shape=shape, packed=lambda: part)
    row = tensor.format.row_bytes(tensor.shape[1]) if len(shape) == 2 else tensor.format.block_bytes
    return replace(tensor, shape=shape, data=tensor.data[begin * row : end * row], begin=tensor.begin + begin * row)


def columns_of(tensor: Tensor, begin: int, end: int) -> Tensor:
    """Columns [begin, end) of a matrix: a copy. Where that would cut a block, the values are decoded."""
    shape = (tensor.shape[0], end - begin)
    read = tensor.packed
    if read is not None:
        weight = read()
        cut = _packed_columns(weight, begin, end)
        if cut is None:
            return float_tensor(tensor.name, weight.decode()[:, begin:end])
        return replace(tensor, shape=shape, packed=lambda: cut)
    block = tensor.format.block_size
    if begin % block or end % block:
        return float_tensor(tensor.name, tensor.to_float32()[:, begin:end])
    rows = np.frombuffer(tensor.data, np.uint8).reshape(tensor.shape[0], -1)
    size = tensor.format.block_bytes
    part = np.ascontiguousarray(rows[:, begin // block * size : end // block * size])
    return replace(tensor, shape=shape, data=part.reshape(-1).data, file=None, begin=0)


def float_tensor(name: str, values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    """A tensor that holds float32 values in memory."""
    data = np.ascontiguousarray(values, np.float32)
    return Tensor(name, data.shape, FORMATS["F32"], data.reshape(-1).data.cast("B"))


def _packed_columns(weight: PackedWeight, begin: int, end: int) -> PackedWeight | None:
    """None: a block would be cut."""
    if isinstance(weight, GroupedInt):
        return _grouped_columns(weight, begin, end)
    if isinstance(weight, RowInt8):
        return replace(weight, codes=np.ascontiguousarray(weight.codes[:, begin:end]))
    width = weight.codes.shape[1]
    codes = np.ascontiguousarray(weight.codes[:, begin:end])
    if isinstance(weight, Codebook4) and not (width % weight.block or begin % weight.block or end % weight.block):
        absmax = weight.absmax.reshape(len(codes), -1)[:, begin // weight.block : end // weight.block]
        return replace(weight, codes=codes, absmax=np.ascontiguousarray(absmax).reshape(-1))
    if isinstance(weight, Float8) and weight.block is None:
        return replace(weight, codes=codes)
    if isinstance(weight, Float8) and weight.block is not None and not (begin % weight.block[1]):
        scales = weight.scales[:, begin // weight.block[1] : -(-end // weight.block[1])]
        return replace(weight, codes=codes, scales=np.ascontiguousarray(scales))
    return None


def _grouped_columns(weight: GroupedInt, begin: int, end: int) -> GroupedInt:
    codes, size = np.ascontiguousarray(weight.codes[:, begin:end]), weight.group_size
    whole = size >= weight.codes.shape[1]  # a row is one group
    if weight.g_idx is not None or (not whole and (begin % size or end % size)):
        return replace(weight, codes=codes, g_idx=weight.groups()[begin:end].copy())
    if whole:
        return replace(weight, codes=codes, group_size=end - begin)
    groups = slice(begin // size, -(-end // size))
    zeros = None if weight.zeros is None else np.ascontiguousarray(weight.zeros[:, groups])
    return replace(weight, codes=codes, scales=np.ascontiguousarray(weight.scales[:, groups]), zeros=zeros)
