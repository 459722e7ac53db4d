"""FlashAttention as a function of torch, forward and backward. See docs/flash-attention.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from nybble.backends.torch.flash.backward import delta_kernel, keys_kernel, queries_kernel
from nybble.backends.torch.flash.forward import forward_kernel
from nybble.backends.torch.flash.numbers import OPTIONS
from nybble.backends.torch.flash.tiles import Tiles, backward_tiles, forward_tiles
from nybble.core.errors import ConfigError

HEAD_WIDTHS = (16, 32, 64, 96, 128, 256)
_NUMBERS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What both directions need to know."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    max_queries: int
    max_keys: int


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v, without a matrix of queries x keys in memory; differentiable in q, k and v.

    q: [batch, queries, heads, head_dim], k and v: [batch, keys, kv_heads, head_dim]; heads a multiple of kv_heads. Or,
    with cu_seqlens (int32 [sequences + 1], where each sequence begins, and the end), [tokens, heads, head_dim]: then
    max_seqlen_q and max_seqlen_k say how long the longest sequence is. causal: the last query sees the last key, and
    each query before it one key less. window: keys that a query sees, itself among them. scale: 1 / sqrt(head_dim) by
    default. softcap: scores are squeezed into (-softcap, softcap). A query that sees no key gives zeros.

    Dao et al. 2022, arXiv 2205.14135, and Dao 2023, arXiv 2307.08691.

    Raises:
        ConfigError: the shapes do not fit together, or there is no kernel for them.
    """
    if cu_seqlens_q is None:
        if q.dim() != 4 or k.dim() != 4 or len(k) != len(q):
            raise ConfigError(f"attention needs [batch, tokens, heads, head_dim], not {list(q.shape)}, {list(k.shape)}")
        cu_seqlens_q, cu_seqlens_k = _even(len(q), q.shape[1], q.device), _even(len(k), k.shape[1], k.device)
        shape = _Shape(causal, scale or q.shape[-1] ** -0.5, window, softcap, q.shape[1], k.shape[1])
        q_flat, k_flat, v_flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        return _run(q_flat, k_flat, v_flat, cu_seqlens_q, cu_seqlens_k, shape).view(q.shape)
    if cu_seqlens_k is None or max_seqlen_q is None or max_seqlen_k is None:
        raise ConfigError("attention over sequences needs cu_seqlens_k, max_seqlen_q and max_seqlen_k as well")
    shape = _Shape(causal, scale or q.shape[-1] ** -0.5, window, softcap, max_seqlen_q, max_seqlen_k)
    return _run(q, k, v, cu_seqlens_q, cu_seqlens_k, shape)


def _even(batch: int, length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, (batch + 1) * length, max(length, 1), dtype=torch.int32, device=device)[: batch + 1]


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, shape: _Shape
) -> torch.Tensor:
    _check(q, k, v, cu_q, cu_k, shape)
    out: torch.Tensor = _FlashAttention.apply(q, k, v, cu_q, cu_k, shape)
    return out


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, shape: _Shape
) -> None:
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ConfigError(f"attention: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ConfigError(f"attention: {q.shape[1]} heads are not a multiple of {k.shape[1]} kv heads")
    if q.shape[2] not in HEAD_WIDTHS:
        raise ConfigError(
            f"attention has no kernel for head_dim {q.shape[2]}, only for {', '.join(map(str, HEAD_WIDTHS))}"
        )
    if q.dtype not in _NUMBERS or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ConfigError(
            f"attention: q, k and v must have one type of {_NUMBERS}, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if len(cu_q) != len(cu_k) or cu_q.dtype != torch.int32 or cu_k.dtype != torch.int32:
        raise ConfigError("attention: cu_seqlens_q and cu_seqlens_k must be int32 and of one length")
    if shape.window is not None and (shape.window < 1 or not shape.causal):
        raise ConfigError(f"attention: a window must be at least 1 and causal, not {shape.window}")
    if shape.softcap is not None and not shape.softcap > 0:
        raise ConfigError(f"attention: softcap must be positive, not {shape.softcap}")


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        shape: _Shape,
    ) -> torch.Tensor:
        q, k, v = (_rows(x) for x in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1], len(q), dtype=torch.float32, device=q.device)
        tiles = forward_tiles(q)
        grid = (triton.cdiv(shape.max_queries, tiles.queries), q.shape[1], len(cu_q) - 1)
        if 0 not in grid:
            forward_kernel[grid](
                q, k, v, out, lse, cu_q, cu_k, *_strides(q, k, v, out), lse.stride(0), *_factors(shape),
                **_constants(q, k, shape, tiles),
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        shape: _Shape = ctx.shape
        d_out = _rows(grads[0])
        dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        delta = torch.empty_like(lse)
        tiles = backward_tiles(q)
        constants = _constants(q, k, shape, tiles)
        sequences = len(cu_q) - 1
        if len(q) and len(k) and sequences:
            delta_kernel[(triton.cdiv(len(q), tiles.queries), q.shape[1])](
                out, d_out, delta, len(q), *_strides(out, d_out), lse.stride(0),
                WIDTH=constants["WIDTH"], BLOCK_WIDTH=constants["BLOCK_WIDTH"], BLOCK_M=tiles.queries, **OPTIONS,
            )  # fmt: skip
            keys_kernel[(triton.cdiv(shape.max_keys, tiles.keys), k.shape[1], sequences)](
                q, k, v, d_out, dk, dv, lse, delta, cu_q, cu_k, *_strides(q, k, v, d_out, dk, dv), lse.stride(0),
                *_factors(shape), **constants,
            )  # fmt: skip
            queries_kernel[(triton.cdiv(shape.max_queries, tiles.queries), q.shape[1], sequences)](
                q, k, v, d_out, dq, lse, delta, cu_q, cu_k, *_strides(q, k, v, d_out, dq), lse.stride(0),
                *_factors(shape), **constants,
            )  # fmt: skip
        return dq, dk, dv, None, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels want the numbers of a head next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in (x.stride(0), x.stride(1))]


def _factors(shape: _Shape) -> tuple[float, float, int]:
    return shape.scale, shape.softcap or 1.0, shape.window or 0


def _constants(q: torch.Tensor, k: torch.Tensor, shape: _Shape, tiles: Tiles) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "WIDTH": q.shape[2],
        "BLOCK_WIDTH": max(triton.next_power_of_2(q.shape[2]), 16),
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
        "CAUSAL": shape.causal,
        "HAS_WINDOW": shape.window is not None,
        "HAS_CAP": shape.softcap is not None,
        **OPTIONS,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
