"""Writing keys and values into the paged cache, with the rotary embedding and the norms of q and k on the way."""

from __future__ import annotations

import torch

from nybble.backends.torch.ops import reference
from nybble.backends.torch.ops.cache_types import check_cache
from nybble.backends.torch.ops.choice import kernels, runs_kernels
from nybble.core.errors import ConfigError


def store_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write k and v [tokens, kv_heads, head_dim] to the slots of their tokens.

    caches: [num_blocks, block_size, kv_heads, head_dim]; slot = block_id * block_size + offset, -1: the token is not
    kept. k_scale, v_scale: float32 [num_blocks, block_size, kv_heads], for caches of int8 and float8_e4m3fn.

    Raises:
        ConfigError: shapes or types do not fit together.
    """
    _check(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    if runs_kernels(k):
        kernels.store_kv(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
        return
    reference.store(k, k_cache, k_scale, slot_mapping)
    reference.store(v, v_cache, v_scale, slot_mapping)


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
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm (if there are weights [head_dim]) and rotate q and k, write k and v to the cache; returns the new q.

    q: [tokens, q_heads, head_dim]. cos, sin: [tokens, rotary_dim / 2] float32, of each token's position. interleaved:
    neighbours (0, 1), (2, 3), ... turn together, otherwise i and i + rotary_dim / 2. The rest as in `store_kv`.
    Su et al. 2021, arXiv 2104.09864.

    Raises:
        ConfigError: shapes or types do not fit together.
    """
    _check(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale)
    _check_rotary(q, k, cos, sin, rotary_dim)
    if (q_norm is None) != (k_norm is None):
        raise ConfigError("rope_store_kv: q_norm and k_norm go together: give both or none")
    for norm in (q_norm, k_norm):
        if norm is not None and norm.shape != k.shape[2:]:
            raise ConfigError(f"rope_store_kv: a norm of {list(norm.shape)} does not go with heads of {k.shape[2]}")
    run = kernels.rope_store_kv if runs_kernels(q) else reference.rope_store_kv
    return run(
        q, k, v, cos, sin, rotary_dim, interleaved, k_cache, v_cache, slot_mapping, q_norm, k_norm, eps, k_scale,
        v_scale,
    )  # fmt: skip


def _check(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    check_cache(k_cache, k_scale, "k")
    check_cache(v_cache, v_scale, "v")
    if k.shape != v.shape or k.dim() != 3 or k.shape[1:] != k_cache.shape[2:] or k_cache.shape != v_cache.shape:
        raise ConfigError(
            f"k {list(k.shape)} and v {list(v.shape)} do not go with caches {list(k_cache.shape)} and "
            f"{list(v_cache.shape)}"
        )
    if slot_mapping.shape != k.shape[:1] or slot_mapping.dtype not in (torch.int32, torch.int64):
        raise ConfigError(
            f"slot_mapping must be int32 or int64 [{len(k)}], not {list(slot_mapping.shape)} of {slot_mapping.dtype}"
        )


def _check_rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int) -> None:
    if q.dim() != 3 or len(q) != len(k) or q.shape[2] != k.shape[2] or q.dtype != k.dtype:
        raise ConfigError(
            f"rope_store_kv: q {list(q.shape)} of {q.dtype} does not go with k {list(k.shape)} of {k.dtype}"
        )
    if rotary_dim % 2 or not 0 < rotary_dim <= q.shape[2]:
        raise ConfigError(f"rope_store_kv: rotary_dim {rotary_dim} must be even and at most {q.shape[2]}")
    if cos.shape != (len(q), rotary_dim // 2) or sin.shape != cos.shape:
        raise ConfigError(
            f"rope_store_kv: cos {list(cos.shape)} and sin {list(sin.shape)} must be {[len(q), rotary_dim // 2]}"
        )
