"""Norm, rotate and store: q, k and v of a step go through memory once between their product and attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import OPTIONS, narrow
from nybble.backends.torch.ops.kernels.store import by_head, cache_constants, put_row


@triton.jit
def _turned(
    base, norm_ptr, cos_ptr, sin_ptr, token, at, inside, eps,
    WIDTH: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """One head, normed and rotated, in float32. The partner of each number is loaded a second time, from the cache."""
    half: tl.constexpr = ROTARY // 2
    turns = at < ROTARY
    if INTERLEAVED:
        partner, pair, is_first = at ^ 1, at // 2, at % 2 == 0
    else:
        is_first = at < half
        partner = tl.where(is_first, at + half, at - half)
        pair = tl.where(is_first, at, at - half)
    kind = base.dtype.element_ty
    x = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(base + partner, mask=turns, other=0.0).to(tl.float32)
    if NORMS:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
        x = narrow(x * scale * tl.load(norm_ptr + at, mask=inside, other=0.0).to(tl.float32), kind).to(tl.float32)
        weight = tl.load(norm_ptr + partner, mask=turns, other=0.0).to(tl.float32)
        other = narrow(other * scale * weight, kind).to(tl.float32)
    cos = tl.load(cos_ptr + token * half + pair, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * half + pair, mask=turns, other=0.0).to(tl.float32)
    turned = x * cos + tl.where(is_first, -other, other) * sin
    return tl.where(turns, turned, x)


@triton.jit
def rope_store_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cos_ptr, sin_ptr, q_norm, k_norm, k_cache, v_cache, k_scale, v_scale, slots,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, q_heads, kv_heads, eps,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, NORMS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, IS_INT: tl.constexpr,
):  # fmt: skip
    """One program has one head of one token: first those of q, then of k, then of v."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    if head < q_heads:
        base = q_ptr + token * stride_qt + head * stride_qh
        q = _turned(base, q_norm, cos_ptr, sin_ptr, token, at, inside, eps, WIDTH, ROTARY, INTERLEAVED, NORMS)
        tl.store(out_ptr + (token * q_heads + head) * WIDTH + at, narrow(q, out_ptr.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            if head < q_heads + kv_heads:
                mine = head - q_heads
                base = k_ptr + token * stride_kt + mine * stride_kh
                k = _turned(base, k_norm, cos_ptr, sin_ptr, token, at, inside, eps, WIDTH, ROTARY, INTERLEAVED, NORMS)
                k = narrow(k, k_ptr.dtype.element_ty).to(tl.float32)
                put_row(k_cache, k_scale, slot * kv_heads + mine, k, inside, WIDTH, LIMIT, IS_INT, BLOCK)
            else:
                mine = head - q_heads - kv_heads
                base = v_ptr + token * stride_vt + mine * stride_vh
                v = tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
                put_row(v_cache, v_scale, slot * kv_heads + mine, v, inside, WIDTH, LIMIT, IS_INT, BLOCK)


def rope_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotary_dim: int,
    interleaved: bool,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> torch.Tensor:
    """The rotated q; k and v are in the cache."""
    q, k, v = by_head(q), by_head(k), by_head(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel():
        rope_store_kernel[(len(q), q.shape[1] + 2 * k.shape[1])](
            q, k, v, out, cos.contiguous(), sin.contiguous(), q if q_norm is None else q_norm,
            k if k_norm is None else k_norm, k_cache, v_cache, k_cache if k_scale is None else k_scale,
            v_cache if v_scale is None else v_scale, slot_mapping, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            v.stride(0), v.stride(1), q.shape[1], k.shape[1], eps, ROTARY=rotary_dim, INTERLEAVED=interleaved,
            NORMS=q_norm is not None, **cache_constants(k_cache), **OPTIONS, num_warps=1,
        )  # fmt: skip
    return out
