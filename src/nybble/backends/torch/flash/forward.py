"""The forward kernel of FlashAttention-2 (Dao 2023, arXiv 2307.08691), for sequences of any lengths.

One program has a tile of queries of one head and walks over the keys it sees. Scores never leave the chip: a running
maximum and a running sum (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867) rescale what was added up so
far whenever a larger score comes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import dot, narrow
from nybble.backends.torch.flash.scores import load_tile, scores, store_tile, visible


@triton.jit
def _walk(
    q, acc, top, total, k_base, v_base, stride_k, stride_v, rows, num_queries, num_keys, begin, end, scale, cap, window,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Add the keys from `begin` to `end`. Without MASKED every query of the tile sees all of them."""
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_base, columns, num_keys, stride_k, WIDTH, BLOCK_WIDTH)
        s, _ = scores(dot(q, tl.trans(k), tl.zeros([rows.shape[0], BLOCK_N], tl.float32)), scale, cap, HAS_CAP)
        if MASKED:
            seen = visible(rows[:, None], columns[None, :], num_queries, num_keys, window, CAUSAL, HAS_WINDOW)
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        # A row that has seen nothing yet keeps -inf, and -inf - -inf must not become NaN.
        zero_at = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - zero_at[:, None])
        shrink = tl.exp2(top - zero_at)
        v = load_tile(v_base, columns, num_keys, stride_v, WIDTH, BLOCK_WIDTH)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        acc = dot(narrow(p, v.dtype), v, acc)
        top = higher
    return acc, top, total


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q, cu_k,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_lh,
    scale, cap, window,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """out[t, h] and lse[h, t], the base-2 logarithm of the softmax's sum (infinity where nothing is seen)."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_begin, k_begin = tl.load(cu_q + sequence).to(tl.int64), tl.load(cu_k + sequence).to(tl.int64)
    num_queries = (tl.load(cu_q + sequence + 1) - q_begin).to(tl.int32)
    num_keys = (tl.load(cu_k + sequence + 1) - k_begin).to(tl.int32)
    first = tile * BLOCK_M
    if first < num_queries:
        rows = first + tl.arange(0, BLOCK_M)
        ahead = num_keys - num_queries
        q = load_tile(q_ptr + q_begin * stride_qt + head * stride_qh, rows, num_queries, stride_qt, WIDTH, BLOCK_WIDTH)
        k_base = k_ptr + k_begin * stride_kt + (head // GROUP) * stride_kh
        v_base = v_ptr + k_begin * stride_vt + (head // GROUP) * stride_vh
        # Keys that some query of the tile sees, and among them those that every query sees, in whole blocks.
        begin, end, full_begin, full_end = 0, num_keys, 0, num_keys
        if CAUSAL:
            end = tl.maximum(tl.minimum(num_keys, first + BLOCK_M + ahead), 0)
            full_end = tl.maximum(tl.minimum(num_keys, first + 1 + ahead), 0)
        if HAS_WINDOW:
            begin = tl.maximum(first + ahead - window + 1, 0) // BLOCK_N * BLOCK_N
            full_begin = tl.maximum(first + BLOCK_M + ahead - window, 0)
        full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK_N) * BLOCK_N, end)
        full_end = tl.maximum(full_end // BLOCK_N * BLOCK_N, full_begin)
        acc = tl.zeros([BLOCK_M, BLOCK_WIDTH], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if HAS_WINDOW:
            acc, top, total = _walk(
                q, acc, top, total, k_base, v_base, stride_kt, stride_vt, rows, num_queries, num_keys, begin,
                full_begin, scale, cap, window, WIDTH, BLOCK_WIDTH, BLOCK_N, True, CAUSAL, HAS_WINDOW, HAS_CAP,
            )  # fmt: skip
        acc, top, total = _walk(
            q, acc, top, total, k_base, v_base, stride_kt, stride_vt, rows, num_queries, num_keys, full_begin,
            full_end, scale, cap, window, WIDTH, BLOCK_WIDTH, BLOCK_N, False, CAUSAL, HAS_WINDOW, HAS_CAP,
        )  # fmt: skip
        acc, top, total = _walk(
            q, acc, top, total, k_base, v_base, stride_kt, stride_vt, rows, num_queries, num_keys, full_end, end,
            scale, cap, window, WIDTH, BLOCK_WIDTH, BLOCK_N, True, CAUSAL, HAS_WINDOW, HAS_CAP,
        )  # fmt: skip
        some = total > 0.0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        out_base = out_ptr + q_begin * stride_ot + head * stride_oh
        store_tile(out_base, rows, num_queries, stride_ot, WIDTH, acc, BLOCK_WIDTH)
        lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("inf"))
        tl.store(lse_ptr + head * stride_lh + q_begin + rows, lse, mask=rows < num_queries)
