"""The weights of quantised safetensors folders as codes in planes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from nybble.backends.torch.ops.low_bit.coded import CodedLinear, Codes
from nybble.backends.torch.ops.low_bit.planes import PLANES, Layout
from nybble.quant.weights import CODEBOOKS, Codebook4, Float8, GroupedInt


def from_grouped(weight: GroupedInt, device: torch.device | str) -> CodedLinear | None:
    """GPTQ, AWQ and compressed-tensors integers. None: groups of sizes that no kernel has."""
    columns = weight.shape[1]
    if weight.bits not in PLANES:
        return None
    groups, order = weight.groups(), None
    size = weight.group_size
    if not np.array_equal(groups, np.arange(columns) // size):  # act-order: the inputs of a group lie anywhere
        order = np.argsort(groups, kind="stable")
        if not np.array_equal(groups[order], np.arange(columns) // size):
            return None
    run = _run(size, columns, 32 if weight.bits in (3, 5, 6) else 128)
    if run is None:
        return None
    codes = weight.codes if order is None else weight.codes[:, order]
    layout = Layout(weight.bits, run)
    low, high = layout.pack(on_device(codes, device))
    scale = weight.scales if weight.scales.dtype == np.float16 else weight.scales.astype(np.float32)
    zero = None if weight.zeros is None else on_device(_zeros(weight.zeros).T, device)
    packed = Codes("int", layout, size, low, high, on_device(scale.T, device), zero, middle=1 << (weight.bits - 1))
    name = f"W{weight.bits}A16"
    return CodedLinear(name, packed, columns, None if order is None else on_device(order.astype(np.int64), device))


def from_codebook(weight: Codebook4, device: torch.device | str) -> CodedLinear | None:
    """NF4 and FP4. None: a block of weights goes over the end of a row."""
    rows, columns = weight.shape
    run = _run(weight.block, columns, 64)
    if columns % weight.block or run is None:
        return None
    layout = Layout(4, run)
    low, _ = layout.pack(on_device(weight.codes, device))
    scale = on_device(weight.absmax.reshape(rows, -1).T, device)
    table = on_device(CODEBOOKS[weight.table], device)
    codes = Codes("table", layout, weight.block, low, None, scale, table=table, table16=table.half())
    return CodedLinear(weight.table.upper(), codes, columns)


def from_float8(weight: Float8, device: torch.device | str) -> CodedLinear | None:
    """e4m3 with a scale for the matrix, each row, or blocks. None: blocks of sizes that no kernel has."""
    rows, columns = weight.shape
    scales, size = weight.scales.astype(np.float32), columns
    if weight.block is not None:
        size = weight.block[1]
        scales = np.repeat(scales, weight.block[0], axis=0)[:rows]
    run = _run(size, columns, 128)
    if run is None:
        return None
    layout = Layout(8, run)
    low, _ = layout.pack(on_device(weight.codes, device))
    scale = on_device(np.broadcast_to(scales, (rows, scales.shape[1])).T, device)
    return CodedLinear("FP8", Codes("e4m3", layout, size, low, None, scale), columns)


def _zeros(zeros: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """In one byte where they fit."""
    fits = zeros.size == 0 or (int(zeros.min()) >= 0 and int(zeros.max()) < 256)
    return zeros.astype(np.uint8 if fits else np.int16)


def _run(group: int, columns: int, most: int) -> int | None:
    """Weights of a run, which must not cross a border between groups; None where they would be too few."""
    if group >= columns:
        return 32 if columns <= 32 else min(most, 64 if columns <= 64 else 128)
    for run in (128, 64, 32, 16):
        if run <= most and group % run == 0:
            return run
    return None


def on_device(array: npt.NDArray[np.generic], device: torch.device | str) -> torch.Tensor:
    """A tensor of it. Arrays that may not be written, as a mapped file's, are copied."""
    whole = np.ascontiguousarray(array)
    return torch.from_numpy(whole if whole.flags.writeable else whole.copy()).to(device)
