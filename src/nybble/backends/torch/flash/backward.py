"""The backward kernels: nothing of size queries x keys was kept, so the probabilities are computed again from q, k and
the logarithm of each row's sum. Two kernels, one per tile of keys (dk, dv) and one per tile of queries (dq), so that
every gradient is added up by one program: no atomics, and the same bits every time.

    p = 2^(s - lse)    dv = p^T do    dp = do v^T    ds = p (dp - delta)    delta = sum(do * out) of each row
"""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import dot, narrow
from nybble.backends.torch.flash.scores import load_tile, scores, store_tile, visible


@triton.jit
def delta_kernel(
    out_ptr, d_out_ptr, delta_ptr, num_tokens, stride_ot, stride_oh, stride_dt, stride_dh, stride_lh,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta[h, t] = sum over the head's width of out * d_out."""
    rows, head = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    rows = rows.to(tl.int64)
    out = load_tile(out_ptr + head * stride_oh, rows, num_tokens, stride_ot, WIDTH, BLOCK_WIDTH).to(tl.float32)
    d_out = load_tile(d_out_ptr + head * stride_dh, rows, num_tokens, stride_dt, WIDTH, BLOCK_WIDTH).to(tl.float32)
    tl.store(delta_ptr + head * stride_lh + rows, tl.sum(out * d_out, axis=1), mask=rows < num_tokens)


@triton.jit
def _d_scores(
    q, k, v, d_out, lse, delta, rows, columns, num_queries, num_keys, scale, cap, window,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """p and d(products) of a tile of queries (rows) and keys (columns), in float32; the factor `scale` is left out."""
    zeros = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    s, squeezed = scores(dot(q, tl.trans(k), zeros), scale, cap, HAS_CAP)
    seen = visible(rows[:, None], columns[None, :], num_queries, num_keys, window, CAUSAL, HAS_WINDOW)
    p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
    dp = dot(d_out, tl.trans(v), zeros)
    ds = p * (dp - delta[:, None])
    if HAS_CAP:
        ds = ds * (1.0 - squeezed * squeezed)
    return p, ds


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, cu_q, cu_k,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh, stride_lh, scale, cap, window,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, over all queries that see it, of all heads that share it."""
    tile, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_begin, k_begin = tl.load(cu_q + sequence).to(tl.int64), tl.load(cu_k + sequence).to(tl.int64)
    num_queries = (tl.load(cu_q + sequence + 1) - q_begin).to(tl.int32)
    num_keys = (tl.load(cu_k + sequence + 1) - k_begin).to(tl.int32)
    first = tile * BLOCK_N
    if first < num_keys:
        columns = first + tl.arange(0, BLOCK_N)
        ahead = num_keys - num_queries
        k_base, v_base = (
            k_ptr + k_begin * stride_kt + kv_head * stride_kh,
            v_ptr + k_begin * stride_vt + kv_head * stride_vh,
        )
        k = load_tile(k_base, columns, num_keys, stride_kt, WIDTH, BLOCK_WIDTH)
        v = load_tile(v_base, columns, num_keys, stride_vt, WIDTH, BLOCK_WIDTH)
        begin, end = 0, num_queries
        if CAUSAL:
            begin = tl.maximum(first - ahead, 0) // BLOCK_M * BLOCK_M
        if HAS_WINDOW:
            end = tl.minimum(num_queries, tl.maximum(first + BLOCK_N - 1 - ahead + window, 0))
        dk = tl.zeros([BLOCK_N, BLOCK_WIDTH], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_WIDTH], tl.float32)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            q_base = q_ptr + q_begin * stride_qt + head * stride_qh
            d_base = d_out_ptr + q_begin * stride_dt + head * stride_dh
            row_base = head * stride_lh + q_begin
            for start in range(begin, end, BLOCK_M):
                rows = start + tl.arange(0, BLOCK_M)
                q = load_tile(q_base, rows, num_queries, stride_qt, WIDTH, BLOCK_WIDTH)
                d_out = load_tile(d_base, rows, num_queries, stride_dt, WIDTH, BLOCK_WIDTH)
                lse = tl.load(lse_ptr + row_base + rows, mask=rows < num_queries, other=float("inf"))
                delta = tl.load(delta_ptr + row_base + rows, mask=rows < num_queries, other=0.0)
                p, ds = _d_scores(
                    q, k, v, d_out, lse, delta, rows, columns, num_queries, num_keys, scale, cap, window, CAUSAL,
                    HAS_WINDOW, HAS_CAP,
                )  # fmt: skip
                dv = dot(tl.trans(narrow(p, d_out.dtype)), d_out, dv)
                dk = dot(tl.trans(narrow(ds, q.dtype)), q, dk)
        dk_base = dk_ptr + k_begin * stride_dkt + kv_head * stride_dkh
        dv_base = dv_ptr + k_begin * stride_dvt + kv_head * stride_dvh
        store_tile(dk_base, columns, num_keys, stride_dkt, WIDTH, dk * scale, BLOCK_WIDTH)
        store_tile(dv_base, columns, num_keys, stride_dvt, WIDTH, dv, BLOCK_WIDTH)


@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dq_ptr, lse_ptr, delta_ptr, cu_q, cu_k,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh, stride_dqt, stride_dqh,
    stride_lh, scale, cap, window,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, over all keys that it sees."""
    tile, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_begin, k_begin = tl.load(cu_q + sequence).to(tl.int64), tl.load(cu_k + sequence).to(tl.int64)
    num_queries = (tl.load(cu_q + sequence + 1) - q_begin).to(tl.int32)
    num_keys = (tl.load(cu_k + sequence + 1) - k_begin).to(tl.int32)
    first = tile * BLOCK_M
    if first < num_queries:
        rows = first + tl.arange(0, BLOCK_M)
        ahead = num_keys - num_queries
        q_base = q_ptr + q_begin * stride_qt + head * stride_qh
        d_base = d_out_ptr + q_begin * stride_dt + head * stride_dh
        k_base = k_ptr + k_begin * stride_kt + (head // GROUP) * stride_kh
        v_base = v_ptr + k_begin * stride_vt + (head // GROUP) * stride_vh
        q = load_tile(q_base, rows, num_queries, stride_qt, WIDTH, BLOCK_WIDTH)
        d_out = load_tile(d_base, rows, num_queries, stride_dt, WIDTH, BLOCK_WIDTH)
        row_base = head * stride_lh + q_begin
        lse = tl.load(lse_ptr + row_base + rows, mask=rows < num_queries, other=float("inf"))
        delta = tl.load(delta_ptr + row_base + rows, mask=rows < num_queries, other=0.0)
        begin, end = 0, num_keys
        if CAUSAL:
            end = tl.maximum(tl.minimum(num_keys, first + BLOCK_M + ahead), 0)
        if HAS_WINDOW:
            begin = tl.maximum(first + ahead - window + 1, 0) // BLOCK_N * BLOCK_N
        dq = tl.zeros([BLOCK_M, BLOCK_WIDTH], tl.float32)
        for start in range(begin, end, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            k = load_tile(k_base, columns, num_keys, stride_kt, WIDTH, BLOCK_WIDTH)
            v = load_tile(v_base, columns, num_keys, stride_vt, WIDTH, BLOCK_WIDTH)
            _, ds = _d_scores(
                q, k, v, d_out, lse, delta, rows, columns, num_queries, num_keys, scale, cap, window, CAUSAL,
                HAS_WINDOW, HAS_CAP,
            )  # fmt: skip
            dq = dot(narrow(ds, k.dtype), k, dq)
        dq_base = dq_ptr + q_begin * stride_dqt + head * stride_dqh
        store_tile(dq_base, rows, num_queries, stride_dqt, WIDTH, dq * scale, BLOCK_WIDTH)
