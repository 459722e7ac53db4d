"""Bookkeeping of the blocks of the KV cache: plain Python, no arrays."""

from nybble.cache.block_pool import BlockPool

__all__ = ["BlockPool"]
