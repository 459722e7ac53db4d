"""The types that keys and values may be kept in, and what a cache must look like."""

from __future__ import annotations

import torch

from nybble.core.errors import ConfigError

# Kept with one float32 scale for each token and head; the largest code of each.
QUANTISED_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CACHE_TYPES = (*FLOATS, *QUANTISED_LIMITS)


def check_cache(cache: torch.Tensor, scale: torch.Tensor | None, which: str) -> None:
    """[num_blocks, block_size, kv_heads, head_dim] and, with codes, scales [num_blocks, block_size, kv_heads].

    Raises:
        ConfigError: it is of another type or shape.
    """
    if cache.dim() != 4 or not cache.is_contiguous():
        raise ConfigError(
            f"the {which} cache must be contiguous [num_blocks, block_size, kv_heads, head_dim], "
            f"not {list(cache.shape)} with the strides {list(cache.stride())}"
        )
    if cache.dtype not in CACHE_TYPES and cache.dtype != torch.float64:
        raise ConfigError(f"the {which} cache has the type {cache.dtype}: use one of {_named(CACHE_TYPES)}")
    if cache.dtype not in QUANTISED_LIMITS:
        if scale is not None:
            raise ConfigError(f"a {which} cache of {cache.dtype} takes no scales: leave {which}_scale out")
        return
    if scale is None or scale.shape != cache.shape[:3] or scale.dtype != torch.float32 or not scale.is_contiguous():
        found = "none" if scale is None else f"{list(scale.shape)} of {scale.dtype}"
        raise ConfigError(
            f"a {which} cache of {cache.dtype} needs contiguous scales {list(cache.shape[:3])} of torch.float32, "
            f"not {found}"
        )


def _named(types: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(one) for one in types)
