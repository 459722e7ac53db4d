"""Activations of 8 bits times weights of 8 bits in the matrix units: int8 with int32 sums, float8 with float32 ones.

Both have one scale per token; weights have one per row, or float8 one per 128 inputs as well (block scales). Inputs
that were left out as outliers are multiplied as floats, only in the runs that have any.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import INTERPRETED, OPTIONS, dot, narrow
from nybble.backends.torch.ops.kernels.quantise import RUN, quantise_rows
from nybble.backends.torch.ops.kernels.tiles import Tile, add_parts
from nybble.backends.torch.ops.kernels.tuning import choose_tile


@triton.jit
def product8_kernel(
    a_ptr, a_scale, marks_ptr, x_ptr, w_ptr, w_scale, out_ptr, m, n, k, runs, stride_x, splits, threshold,
    IS_INT: tl.constexpr, HAS_OUTLIERS: tl.constexpr, BY_RUN: tl.constexpr, RUN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [m, n], or float32 parts [splits, m, n]. w: [n, runs * RUN]; its scales [1 or runs, n]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    inside, real = rows < n, tokens < m
    across = tl.arange(0, RUN)
    w_row = w_ptr + rows.to(tl.int64)[:, None] * (runs * RUN) + across[None, :]
    a_row = a_ptr + tokens.to(tl.int64)[:, None] * (runs * RUN) + across[None, :]
    x_row = x_ptr + tokens.to(tl.int64)[:, None] * stride_x + across[None, :]
    kind: tl.constexpr = tl.int32 if IS_INT else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_N], kind)
    floats = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    each = tl.cdiv(runs, splits)
    for run in range(split * each, tl.minimum(split * each + each, runs)):
        w = tl.load(w_row + run * RUN, mask=inside[:, None], other=0.0)
        a = tl.load(a_row + run * RUN, mask=real[:, None], other=0.0)
        if INTERPRETED and IS_INT == 0:
            a, w = a.to(tl.float32), w.to(tl.float32)
        if BY_RUN:
            factor = tl.load(w_scale + run * n + rows, mask=inside, other=0.0)
            floats += dot(a, tl.trans(w), tl.zeros([BLOCK_M, BLOCK_N], kind)).to(tl.float32) * factor[None, :]
        else:
            acc = dot(a, tl.trans(w), acc)
        if HAS_OUTLIERS:
            marks = tl.load(marks_ptr + tokens * runs + run, mask=real, other=0)
            if tl.max(marks.to(tl.int32), axis=0) > 0:
                columns = run * RUN + across
                x = tl.load(x_row + run * RUN, mask=real[:, None] & (columns < k)[None, :], other=0.0)
                x = tl.where(tl.abs(x.to(tl.float32)) >= threshold, x, 0.0)
                floats = dot(x, tl.trans(narrow(w.to(tl.float32), x.dtype)), floats)
    scale = tl.load(a_scale + tokens, mask=real, other=0.0)
    if BY_RUN:
        y = floats * scale[:, None]
    else:
        factor = tl.load(w_scale + rows, mask=inside, other=0.0)
        y = (acc.to(tl.float32) * scale[:, None] + floats) * factor[None, :]
    to = out_ptr + (split.to(tl.int64) * m + tokens)[:, None] * n + rows[None, :]
    tl.store(to, narrow(y, out_ptr.dtype.element_ty), mask=inside[None, :] & real[:, None])


def product8(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    """x [M, in] -> [M, out]. weight: int8 or float8_e4m3fn [out, whole runs]; scale: float32 [1 or runs, out]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if not len(x) or not len(weight):
        return torch.empty((len(x), len(weight)), dtype=x.dtype, device=x.device)
    codes, a_scale, marks = quantise_rows(x, weight.dtype, threshold)
    key = f"product8 {weight.dtype} {x.dtype} {len(scale)} {threshold > 0}"

    def run(tile: Tile) -> torch.Tensor:
        m, n, runs = len(x), len(weight), codes.shape[1] // RUN
        out = torch.empty((tile.splits, m, n), dtype=x.dtype if tile.splits == 1 else torch.float32, device=x.device)
        product8_kernel[(triton.cdiv(n, tile.rows), triton.cdiv(m, tile.tokens), tile.splits)](
            codes, a_scale, marks, x, weight, scale, out, m, n, x.shape[1], runs, x.stride(0), tile.splits, threshold,
            IS_INT=weight.dtype == torch.int8, HAS_OUTLIERS=threshold > 0, BY_RUN=len(scale) > 1, RUN=RUN,
            BLOCK_M=tile.tokens, BLOCK_N=tile.rows, num_warps=tile.warps,
            num_stages=tile.stages, **OPTIONS,
        )  # fmt: skip
        return add_parts(out, x.dtype)

    return run(choose_tile(key, x, len(weight), run))
