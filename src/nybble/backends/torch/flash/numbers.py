"""What all kernels share: products of tiles, rounding, and whether all of this runs in the interpreter."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Products and sums are fused, on purpose; without it Triton 3.9 warns that its default will change.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors of the CPU."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc):
    """acc + a b, summed in float32, or int32 for int8. The interpreter multiplies bfloat16 wrongly: it gets float32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def narrow(x, kind: tl.constexpr):
    """float32 in another type, rounded to nearest. The interpreter's own conversions are not; this makes them exact."""
    if INTERPRETED:
        if kind == tl.bfloat16:
            x = _rounded(x, 16)
        elif kind == tl.float8e4nv:
            x = tl.where(tl.abs(x) < 0.015625, nearest(x * 512.0) / 512.0, _rounded(x, 20))
    return x.to(kind)


@triton.jit
def _rounded(x, DROPPED: tl.constexpr):
    """float32 with its last DROPPED bits rounded away, halves to even."""
    bits = x.to(tl.int32, bitcast=True)
    bits += ((bits >> DROPPED) & 1) + ((1 << (DROPPED - 1)) - 1)
    return ((bits >> DROPPED) << DROPPED).to(tl.float32, bitcast=True)


@triton.jit
def nearest(x):
    """Rounded to whole numbers, halves to even, for |x| < 2^22: the sum leaves no bits below one."""
    return (x + 12582912.0) - 12582912.0
