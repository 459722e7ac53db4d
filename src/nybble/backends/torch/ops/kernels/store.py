"""Keys and values into the slots of the paged cache, as floats or as codes with a scale per token and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import OPTIONS, narrow, nearest
from nybble.backends.torch.ops.cache_types import QUANTISED_LIMITS


@triton.jit
def put_row(
    cache_ptr, scale_ptr, row, values, inside, WIDTH: tl.constexpr, LIMIT: tl.constexpr, IS_INT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write float32 values [BLOCK] to row `row` = slot * kv_heads + head. LIMIT: the largest code, 0: floats."""
    at = cache_ptr + row * WIDTH + tl.arange(0, BLOCK)
    if LIMIT == 0:
        tl.store(at, narrow(values, cache_ptr.dtype.element_ty), mask=inside)
    else:
        scale = tl.max(tl.abs(tl.where(inside, values, 0.0)), axis=0) / LIMIT
        codes = values / tl.where(scale > 0, scale, 1.0)
        if IS_INT:
            codes = nearest(codes)
        codes = tl.minimum(tl.maximum(codes, -LIMIT), LIMIT)
        tl.store(at, narrow(codes, cache_ptr.dtype.element_ty), mask=inside)
        tl.store(scale_ptr + row, scale)


@triton.jit
def store_kernel(
    k_ptr, v_ptr, k_cache, v_cache, k_scale, v_scale, slots, stride_kt, stride_kh, stride_vt, stride_vh, kv_heads,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, IS_INT: tl.constexpr,
):  # fmt: skip
    """One program has k (program_id 2 is 0) or v of one head of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    if slot >= 0:
        row = slot * kv_heads + head
        if tl.program_id(2) == 0:
            k = tl.load(k_ptr + token * stride_kt + head * stride_kh + at, mask=inside, other=0.0).to(tl.float32)
            put_row(k_cache, k_scale, row, k, inside, WIDTH, LIMIT, IS_INT, BLOCK)
        else:
            v = tl.load(v_ptr + token * stride_vt + head * stride_vh + at, mask=inside, other=0.0).to(tl.float32)
            put_row(v_cache, v_scale, row, v, inside, WIDTH, LIMIT, IS_INT, BLOCK)


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """Write each token's heads to its slot."""
    k, v = by_head(k), by_head(v)
    if k.numel():
        store_kernel[(len(k), k.shape[1], 2)](
            k, v, k_cache, v_cache, k_cache if k_scale is None else k_scale, v_cache if v_scale is None else v_scale,
            slot_mapping, k.stride(0), k.stride(1), v.stride(0), v.stride(1), k.shape[1], **cache_constants(k_cache),
            **OPTIONS, num_warps=1,
        )  # fmt: skip


def by_head(x: torch.Tensor) -> torch.Tensor:
    """The kernels want the numbers of a head next to each other."""
    return x if x.stride(2) == 1 else x.contiguous()


def cache_constants(cache: torch.Tensor) -> dict[str, int | float | bool]:
    """What a kernel must know about a cache's rows when it is compiled."""
    return {
        "WIDTH": cache.shape[3],
        "BLOCK": triton.next_power_of_2(cache.shape[3]),
        "LIMIT": QUANTISED_LIMITS.get(cache.dtype, 0),
        "IS_INT": cache.dtype == torch.int8,
    }
