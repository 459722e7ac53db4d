"""Floats times a matrix of codes: y = x w^T, with w decoded in registers on its way into the matrix units.

One skeleton for all encodings and both regimes. With few tokens (M up to 16) the codes are what takes time, so each is
loaded once and nothing is written back but y; the sums of each run are scaled after its product, in float32. With many
tokens arithmetic takes the time: the scale goes into the weights, so that one accumulator runs through all inputs.
Where there are too few tiles for the device, the inputs are split among programs, and the parts are added up after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import OPTIONS, dot, narrow
from nybble.backends.torch.flash.tiles import shared_bytes
from nybble.backends.torch.ops.kernels.decode import code_of, decode
from nybble.backends.torch.ops.kernels.tiles import Tile, add_parts, few_tokens
from nybble.backends.torch.ops.kernels.tuning import choose_tile

if TYPE_CHECKING:
    from nybble.backends.torch.ops.low_bit.coded import Codes


@triton.jit
def product_kernel(
    x_ptr, low_ptr, high_ptr, scale_ptr, zero_ptr, minimum_ptr, packed_ptr, table_ptr, out_ptr,
    m, n, k, chunks, groups, middle, stride_x, splits,
    MEANING: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr, LOWS: tl.constexpr, RUN: tl.constexpr,
    GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALE_AFTER: tl.constexpr,
):  # fmt: skip
    """out [m, n], or float32 parts [splits, m, n]."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    inside, real = rows < n, tokens < m
    across = tl.arange(0, RUN)
    per_byte: tl.constexpr = 8 // LOW_BITS
    HAS_OFFSET: tl.constexpr = (MEANING == "k") or (MEANING == "k2") or (MEANING == "affine")
    low_row = low_ptr + rows.to(tl.int64)[:, None] * (chunks * LOWS * RUN) + across[None, :]
    high_row = high_ptr + rows.to(tl.int64)[:, None] * (chunks * RUN) + across[None, :]
    x_row = x_ptr + tokens.to(tl.int64)[:, None] * stride_x + across[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    each = tl.cdiv(chunks, splits)
    for chunk in range(split * each, tl.minimum(split * each + each, chunks)):
        high = tl.zeros([1, 1], tl.uint8)
        if HIGH_BITS > 0:
            high = tl.load(high_row + chunk * RUN, mask=inside[:, None], other=0)
        for tile in tl.static_range(LOWS):
            low = tl.load(low_row + (chunk * LOWS + tile) * RUN, mask=inside[:, None], other=0)
            for part in tl.static_range(per_byte):
                run = chunk * (LOWS * per_byte) + tile * per_byte + part
                columns = run * RUN + across
                x = tl.load(x_row + run * RUN, mask=real[:, None] & (columns < k)[None, :], other=0.0)
                values, factor, offset = decode(
                    code_of(low, high, tile * per_byte + part, LOW_BITS, HIGH_BITS), run, rows, inside, n, groups,
                    scale_ptr, zero_ptr, minimum_ptr, packed_ptr, table_ptr, middle, MEANING, GROUP, RUN, HAS_ZERO,
                )  # fmt: skip
                if SCALE_AFTER:
                    sums = dot(narrow(values, x.dtype), tl.trans(x), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
                    acc += sums * factor[:, None]
                    if HAS_OFFSET:
                        acc -= offset[:, None] * tl.sum(x.to(tl.float32), axis=1)[None, :]
                else:
                    weights = values * factor[:, None]
                    if HAS_OFFSET:
                        weights -= offset[:, None]
                    acc = dot(narrow(weights, x.dtype), tl.trans(x), acc)
    to = out_ptr + (split.to(tl.int64) * m + tokens)[None, :] * n + rows[:, None]
    tl.store(to, narrow(acc, out_ptr.dtype.element_ty), mask=inside[:, None] & real[None, :])


def product(x: torch.Tensor, codes: Codes) -> torch.Tensor:
    """x [M, in] in the order of the matrix -> [M, out], of the type of x."""
    x = x if x.stride(1) == 1 else x.contiguous()
    out_features = codes.low.shape[0]
    if not len(x) or not out_features:
        return torch.empty((len(x), out_features), dtype=x.dtype, device=x.device)
    key = f"{codes.meaning}{codes.layout.bits} run {codes.layout.run} group {codes.group} {x.dtype}"
    tile = choose_tile(key, x, out_features, lambda tile: run_product(x, codes, tile))
    return run_product(x, codes, tile)


def run_product(x: torch.Tensor, codes: Codes, tile: Tile) -> torch.Tensor:
    """With this tile."""
    m, n = len(x), codes.low.shape[0]
    layout = codes.layout
    chunks = codes.low.shape[1] // (layout.lows * layout.run)
    dtype = x.dtype if tile.splits == 1 else torch.float32
    out = torch.empty((tile.splits, m, n), dtype=dtype, device=x.device)
    spare = codes.low
    table = codes.table if x.element_size() == 4 else codes.table16
    grid = (triton.cdiv(n, tile.rows), triton.cdiv(m, tile.tokens), tile.splits)
    product_kernel[grid](
        x, codes.low, _or(codes.high, spare), codes.scale, _or(codes.zero, spare), _or(codes.minimum, codes.scale),
        _or(codes.packed, spare), _or(table, codes.scale), out, m, n, x.shape[1], chunks, len(codes.scale),
        codes.middle, x.stride(0), tile.splits, **_constants(codes), BLOCK_M=tile.tokens, BLOCK_N=tile.rows,
        SCALE_AFTER=few_tokens(tile) and codes.meaning != "k16", **OPTIONS, num_warps=tile.warps,
        num_stages=_stages(codes, tile, x),
    )  # fmt: skip
    return add_parts(out, x.dtype)


def _stages(codes: Codes, tile: Tile, x: torch.Tensor) -> int:
    """As many chunks on their way as the tile says, or as fit the shared memory beside the rest."""
    layout = codes.layout
    codes_bytes = tile.rows * layout.run * (layout.lows + (layout.high_bits > 0))
    chunk_bytes = tile.tokens * layout.chunk * x.element_size() + codes_bytes
    return max(1, min(tile.stages, shared_bytes(x.device) * 7 // 8 // chunk_bytes))


def _constants(codes: Codes) -> dict[str, Any]:
    layout = codes.layout
    return {
        "MEANING": codes.meaning,
        "LOW_BITS": layout.low_bits,
        "HIGH_BITS": layout.high_bits,
        "LOWS": layout.lows,
        "RUN": layout.run,
        "GROUP": codes.group,
        "HAS_ZERO": codes.zero is not None,
    }


def _or(part: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel takes a pointer for what an encoding does not have, too."""
    return other if part is None else part
