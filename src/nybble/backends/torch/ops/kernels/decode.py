"""Codes in planes -> numbers, a tile [rows of the matrix, one run of inputs] at a time, in registers.

    weight = value * factor[row] - offset[row]

The values are small whole numbers wherever the encoding allows it: a product of them is exact, and the factor, which is
one per row and run, is applied to its sum. What each meaning is: low_bit/coded.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

RAISED_BY = tl.constexpr(8388608.0)  # 2^23


@triton.jit
def raised(code):
    """A code below 2^23, plus 2^23, as float32: put into its mantissa. A zero point is taken off with 2^23, at once."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def whole(code):
    """A code below 2^23 as float32, in two fast instructions."""
    return raised(code) - RAISED_BY


@triton.jit
def code_of(
    low, high, INDEX: tl.constexpr, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr
):  # fmt: skip
    """The codes of run INDEX of a chunk, from its bytes."""
    per_byte: tl.constexpr = 8 // LOW_BITS
    code = low
    if LOW_BITS < 8:
        code = (low >> (LOW_BITS * (INDEX % per_byte))) & ((1 << LOW_BITS) - 1)
    if HIGH_BITS > 0:
        code = code | (((high >> (HIGH_BITS * INDEX)) & ((1 << HIGH_BITS) - 1)) << LOW_BITS)
    return code


@triton.jit
def decode(
    code, run, rows, inside, n, groups, scale_ptr, zero_ptr, minimum_ptr, packed_ptr, table_ptr, middle,
    MEANING: tl.constexpr, GROUP: tl.constexpr, RUN: tl.constexpr, HAS_ZERO: tl.constexpr,
):  # fmt: skip
    """values [rows, RUN], factor [rows], offset [rows] of one run. Only `k`, `k2` and `affine` have an offset."""
    offset = tl.zeros([rows.shape[0]], tl.float32)
    if MEANING == "k":
        factor, offset = _six_bit_scales(run, rows, inside, n, scale_ptr, minimum_ptr, packed_ptr)
        values = whole(code)
    elif MEANING == "k2":
        both = tl.load(packed_ptr + run * n + rows, mask=inside, other=0)
        of_block = (run * RUN // 256) * n + rows
        factor = tl.load(scale_ptr + of_block, mask=inside, other=0.0).to(tl.float32) * whole(both & 15)
        offset = tl.load(minimum_ptr + of_block, mask=inside, other=0.0).to(tl.float32) * whole(both >> 4)
        values = whole(code)
    elif MEANING == "ktable":
        scale = tl.load(packed_ptr + run * n + rows, mask=inside, other=0).to(tl.float32)
        factor = tl.load(scale_ptr + (run * RUN // 256) * n + rows, mask=inside, other=0.0).to(tl.float32) * scale
        values = tl.load(table_ptr + code).to(tl.float32)
    elif MEANING == "k16":
        factor = tl.load(scale_ptr + (run * RUN // 256) * n + rows, mask=inside, other=0.0).to(tl.float32)
        small = run * (RUN // 16) + tl.arange(0, RUN) // 16
        scales = tl.load(packed_ptr + small[None, :] * n + rows[:, None], mask=inside[:, None], other=0)
        values = (raised(code) - (middle + RAISED_BY)) * scales.to(tl.float32)
    else:
        # Inputs that only fill up the last chunk have no group.
        at = tl.minimum(run * RUN // GROUP, groups - 1) * n + rows
        factor = tl.load(scale_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if MEANING == "table":
            values = tl.load(table_ptr + code).to(tl.float32)
        elif MEANING == "e4m3":
            values = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        elif MEANING == "affine":
            values = whole(code)
            offset = -tl.load(minimum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        elif HAS_ZERO:
            zero = tl.load(zero_ptr + at, mask=inside, other=0).to(tl.float32)
            values = raised(code) - (zero + RAISED_BY)[:, None]
        else:
            values = raised(code) - (middle + RAISED_BY)
    return values, factor, offset


@triton.jit
def _six_bit_scales(run, rows, inside, n, scale_ptr, minimum_ptr, packed_ptr):
    """d * scale and dmin * min of run j = 0..7 of a block of 256 weights (the k-quants of ggml).

    Of twelve bytes s, scale j < 4 is s[j] & 63 and minimum j is s[j + 4] & 63; the others have their low four bits in
    s[j + 4] (scale: low half, minimum: high half) and their upper two in the top of s[j - 4] and s[j].
    """
    block, j = run // 8, run % 8
    first = packed_ptr + block * 12 * n + rows
    at_j = tl.load(first + j * n, mask=inside, other=0)
    later = tl.load(first + (j + 4) * n, mask=inside, other=0)
    earlier = tl.load(first + tl.maximum(j - 4, 0) * n, mask=inside, other=0)
    is_early = j < 4
    scale = tl.where(is_early, at_j & 63, (later & 15) | ((earlier >> 6) << 4))
    minimum = tl.where(is_early, later & 63, (later >> 4) | ((at_j >> 6) << 4))
    d = tl.load(scale_ptr + block * n + rows, mask=inside, other=0.0).to(tl.float32)
    dmin = tl.load(minimum_ptr + block * n + rows, mask=inside, other=0.0).to(tl.float32)
    return d * whole(scale), dmin * whole(minimum)
