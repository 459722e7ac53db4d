"""A tile of queries walks over cached keys: online softmax as in FlashAttention, with keys found through block tables.

The rows of a tile are queries of all heads that share one kv head, so keys and values are read once for the group:
row r is query r // GROUP of the tile and head r % GROUP of the group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import dot, narrow
from nybble.backends.torch.flash.scores import scores


@triton.jit
def load_rows(
    cache, scale_ptr, table, columns, kv_len, kv_head, kv_heads, kind,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr,
    QUANTISED: tl.constexpr,
):  # fmt: skip
    """Keys or values [columns, BLOCK_WIDTH] in the type of `kind`, and their scales [columns] (else 1)."""
    across = tl.arange(0, BLOCK_WIDTH)
    if MASKED:
        inside = columns < kv_len
        block = tl.load(table + columns // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    else:
        block = tl.load(table + columns // BLOCK_SIZE).to(tl.int64)
    row = (block * BLOCK_SIZE + columns % BLOCK_SIZE) * kv_heads + kv_head
    at = cache + row[:, None] * WIDTH + across[None, :]
    if MASKED:
        values = tl.load(at, mask=inside[:, None] & (across < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK_WIDTH:
        values = tl.load(at)
    else:
        values = tl.load(at, mask=(across < WIDTH)[None, :], other=0.0)
    scale = tl.full([1], 1.0, tl.float32)
    if QUANTISED:
        scale = tl.load(scale_ptr + row, mask=columns < kv_len, other=0.0)
    return narrow(values.to(tl.float32), kind.dtype), scale


@triton.jit
def walk(
    q, acc, top, total, k_cache, v_cache, k_scale, v_scale, table, kv_head, kv_heads, at, kv_len, begin, end, scale,
    cap, window, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """Add the keys from `begin` to `end`. at: the key that each row's query is. Without MASKED all rows see them."""
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k, k_factor = load_rows(
            k_cache, k_scale, table, columns, kv_len, kv_head, kv_heads, q, WIDTH, BLOCK_WIDTH, BLOCK_SIZE, MASKED,
            QUANTISED,
        )  # fmt: skip
        products = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        if QUANTISED:
            products = products * k_factor[None, :]
        s, _ = scores(products, scale, cap, HAS_CAP)
        if MASKED:
            seen = (columns[None, :] <= at[:, None]) & (columns < end)[None, :]
            if HAS_WINDOW:
                seen = seen & (columns[None, :] > at[:, None] - window)
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        # A row that has seen nothing yet keeps -inf, and -inf - -inf must not become NaN.
        zero_at = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - zero_at[:, None])
        shrink = tl.exp2(top - zero_at)
        v, v_factor = load_rows(
            v_cache, v_scale, table, columns, kv_len, kv_head, kv_heads, q, WIDTH, BLOCK_WIDTH, BLOCK_SIZE, MASKED,
            QUANTISED,
        )  # fmt: skip
        total = total * shrink + tl.sum(p, axis=1)
        if QUANTISED:
            p = p * v_factor[None, :]
        acc = dot(narrow(p, q.dtype), v, acc * shrink[:, None])
        top = higher
    return acc, top, total
