"""What every kernel means, in plain torch: it runs on CPU tensors, and the kernels are tested against it.

Arithmetic is float32, or float64 where the inputs are; results have the type of the inputs.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from nybble.backends.torch.ops.cache_types import QUANTISED_LIMITS

Activation = Literal["silu", "gelu_tanh"]


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, x + residual). The sum is rounded to the type of x before it is normalised."""
    total = x if residual is None else x + residual
    wide = widened(total)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * widened(weight)
    return normed.to(x.dtype), total


def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: Activation) -> torch.Tensor:
    """activation(gate) * up."""
    wide = widened(gate)
    active = F.silu(wide) if kind == "silu" else F.gelu(wide, approximate="tanh")
    return (active * widened(up)).to(gate.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int, interleaved: bool) -> torch.Tensor:
    """x: [tokens, heads, head_dim]; cos and sin: [tokens, rotary_dim / 2]. Dimensions beyond rotary_dim stay."""
    wide, half = widened(x), rotary_dim // 2
    cos, sin = widened(cos)[:, None], widened(sin)[:, None]
    turned, rest = wide[..., :rotary_dim], wide[..., rotary_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((out, rest), dim=-1).to(x.dtype)


def quantise_heads(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, heads, head_dim] -> codes of int8 or float8, and one float32 scale for each token and head."""
    limit = QUANTISED_LIMITS[dtype]
    wide = x.float()
    scale = wide.abs().amax(-1) / limit
    scaled = wide / torch.where(scale > 0, scale, 1.0)[..., None]
    codes = scaled.round() if dtype == torch.int8 else scaled
    return codes.clamp(-limit, limit).to(dtype), scale


def store(x: torch.Tensor, cache: torch.Tensor, scale: torch.Tensor | None, slot_mapping: torch.Tensor) -> None:
    """Write the rows of tokens [tokens, heads, head_dim] to their slots of one cache; slot -1 is skipped."""
    kept = slot_mapping >= 0
    slots, rows = slot_mapping[kept].long(), x[kept]
    if scale is None:
        cache.view(-1, *cache.shape[2:])[slots] = rows.to(cache.dtype)
        return
    codes, scales = quantise_heads(rows, cache.dtype)
    # Bytes, because not every torch can index float8.
    cache.view(torch.uint8).view(-1, *cache.shape[2:])[slots] = codes.view(torch.uint8)
    scale.view(-1, scale.shape[2])[slots] = scales


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
    """The rotated q; k is normed and rotated into its cache, v goes into its own."""
    if q_norm is not None:
        q = rms_norm(q, q_norm, eps)[0]
    if k_norm is not None:
        k = rms_norm(k, k_norm, eps)[0]
    store(rotate(k, cos, sin, rotary_dim, interleaved), k_cache, k_scale, slot_mapping)
    store(v, v_cache, v_scale, slot_mapping)
    return rotate(q, cos, sin, rotary_dim, interleaved)


def cached(cache: torch.Tensor, scale: torch.Tensor | None, blocks: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` rows of the blocks of one sequence, decoded: [length, kv_heads, head_dim]."""
    # float8 has few operations: its bytes are gathered.
    parts = cache.view(torch.uint8)[blocks].view(cache.dtype) if scale is not None else cache[blocks]
    rows = widened(parts.flatten(0, 1)[:length])
    return rows if scale is None else rows * scale[blocks].flatten(0, 1)[:length, :, None]


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    sm_scale: float,
    window: int | None,
    softcap: float | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> torch.Tensor:
    """One sequence after the other, by the formula."""
    out = torch.zeros_like(q)
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    group = q.shape[1] // num_kv_heads
    bounds = cu_seqlens_q.tolist()
    for index, kv_len in enumerate(kv_lens.tolist()):
        begin, end = bounds[index], bounds[index + 1]
        if kv_len == 0 or begin == end:
            continue
        blocks = block_tables[index, : -(-kv_len // block_size)].long()
        k = cached(k_cache, k_scale, blocks, kv_len).repeat_interleave(group, dim=1)
        v = cached(v_cache, v_scale, blocks, kv_len).repeat_interleave(group, dim=1)
        s = torch.einsum("qhd,khd->hqk", widened(q[begin:end]).to(k.dtype), k) * sm_scale
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        s = s.masked_fill(~visible(end - begin, kv_len, window, q.device), float("-inf"))
        p = torch.softmax(s, dim=-1).nan_to_num(0.0)
        out[begin:end] = torch.einsum("hqk,khd->qhd", p, v).to(q.dtype)
    return out


def visible(q_len: int, kv_len: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[q_len, kv_len], true where a query sees a key: the last query sees the last key."""
    distance = (torch.arange(q_len, device=device) + kv_len - q_len)[:, None] - torch.arange(kv_len, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def widened(x: torch.Tensor) -> torch.Tensor:
    """The type that arithmetic is done in."""
    return x if x.dtype == torch.float64 else x.float()
