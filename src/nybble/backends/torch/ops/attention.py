"""Attention over the paged cache: decoding, and chunks of prompts, in one ragged call."""

from __future__ import annotations

from typing import Any

import torch

from nybble.backends.torch.ops import reference
from nybble.backends.torch.ops.cache_types import check_cache
from nybble.backends.torch.ops.choice import kernels, runs_kernels
from nybble.core.errors import ConfigError


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    *,
    sm_scale: float,
    window: int | None = None,
    softcap: float | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    max_q_len: int,
    num_decodes: int = 0,
) -> torch.Tensor:
    """softmax(sm_scale q k^T) v of each sequence's queries over its cached keys; [tokens, q_heads, head_dim] as q.

    q: [tokens, q_heads, head_dim], the queries of all sequences one after the other; q_heads a multiple of kv_heads.
    caches and scales: as in `store_kv`, with the keys of the queries themselves already written. block_tables: int32
    [sequences, blocks]; entries past the last key are not read. cu_seqlens_q: int32 [sequences + 1], where the queries
    of each sequence begin, and the end. kv_lens: int32 [sequences], keys in the cache; a sequence with 0 gives zeros.
    The last query sees the last key, each query before it one key less. window: keys that a query sees, itself among
    them. softcap: scores are squeezed into (-softcap, softcap). max_q_len: of the longest sequence of queries.
    num_decodes: so many sequences at the front have one query each; when others have more, this lets the kernels
    split the keys of those. With max_q_len 1 all sequences are taken so, whatever it says.

    Nothing is read back from the device, so a CUDA graph can hold the call.

    Raises:
        ConfigError: shapes or types do not fit together, or there is no kernel for them.
    """
    _check(q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens)
    check_cache(k_cache, k_scale, "k")
    check_cache(v_cache, v_scale, "v")
    if window is not None and window < 1:
        raise ConfigError(f"attention: a window must be at least 1, not {window}")
    if softcap is not None and not softcap > 0:
        raise ConfigError(f"attention: softcap must be positive, not {softcap}")
    if max_q_len < 1 or not 0 <= num_decodes <= len(kv_lens):
        raise ConfigError(f"attention: max_q_len {max_q_len} must be at least 1, num_decodes {num_decodes} at most all")
    options: dict[str, Any] = {
        "sm_scale": sm_scale,
        "window": window,
        "softcap": softcap,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    arrays = (q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens)
    if runs_kernels(q):
        out: torch.Tensor = kernels.paged_attention(*arrays, **options, max_q_len=max_q_len, num_decodes=num_decodes)
        return out
    return reference.paged_attention(*arrays, **options)


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
) -> None:
    if q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape or q.shape[2] != k_cache.shape[3]:
        raise ConfigError(
            f"attention: q {list(q.shape)} does not go with caches {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if k_cache.shape[2] == 0 or q.shape[1] % k_cache.shape[2]:
        raise ConfigError(f"attention: {q.shape[1]} heads are not a multiple of {k_cache.shape[2]} kv heads")
    count = len(kv_lens)
    if block_tables.dim() != 2 or len(block_tables) != count or cu_seqlens_q.shape != (count + 1,):
        raise ConfigError(
            f"attention: block_tables {list(block_tables.shape)} and cu_seqlens_q {list(cu_seqlens_q.shape)} do not go "
            f"with {count} kv_lens"
        )
    for name, array in (("block_tables", block_tables), ("cu_seqlens_q", cu_seqlens_q), ("kv_lens", kv_lens)):
        if array.dtype != torch.int32:
            raise ConfigError(f"attention: {name} must be int32, not {array.dtype}")
