"""Attention over the paged cache: one program has a tile of queries of one kv head, or one piece of the keys of it.

Decoding has one query per sequence, which would leave most of a GPU idle: there the keys are split among programs,
each leaves its part of the result and the logarithm of its sum, and a second kernel merges them (Dao et al. 2023,
Flash-Decoding). Chunks of prompts have queries enough and are not split.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import OPTIONS, interpreted, narrow
from nybble.backends.torch.ops.cache_types import QUANTISED_LIMITS
from nybble.backends.torch.ops.kernels.merge import merge_splits
from nybble.backends.torch.ops.kernels.paged_walk import walk
from nybble.core.errors import ConfigError

_WIDEST = 256
_MOST_SPLITS = 64
_KEYS_PER_SPLIT = 256


@triton.jit
def paged_kernel(
    q_ptr, k_cache, v_cache, k_scale, v_scale, out_ptr, lse_ptr, tables, cu_q, kv_lens, first_sequence,
    stride_qt, stride_qh, stride_table, q_heads, kv_heads, splits, scale, cap, window,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS_KEYS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, QUANTISED: tl.constexpr,
):  # fmt: skip
    """out [tokens, q_heads, WIDTH], or with SPLITS_KEYS parts [sequences, q_heads, splits, WIDTH] and their lse."""
    kv_head, sequence = tl.program_id(1), tl.program_id(2) + first_sequence
    q_begin = tl.load(cu_q + sequence)
    q_len = tl.load(cu_q + sequence + 1) - q_begin
    kv_len = tl.load(kv_lens + sequence)
    first = 0 if SPLITS_KEYS else tl.program_id(0) * BLOCK_Q
    if first < q_len:
        row = tl.arange(0, BLOCK_M)
        query, head = first + row // GROUP, kv_head * GROUP + row % GROUP
        real = (row < BLOCK_Q * GROUP) & (query < q_len)
        across = tl.arange(0, BLOCK_WIDTH)
        inside = real[:, None] & (across < WIDTH)[None, :]
        token = (q_begin + query).to(tl.int64)
        q = tl.load(
            q_ptr + token[:, None] * stride_qt + head[:, None] * stride_qh + across[None, :], mask=inside, other=0.0
        )
        ahead = kv_len - q_len
        at = tl.where(real, query + ahead, -1)
        # Keys that some query of the tile sees, and among them, in whole blocks, those that all of them see.
        end = tl.maximum(tl.minimum(kv_len, first + BLOCK_Q + ahead), 0)
        begin, full_begin, full_end = 0, 0, tl.maximum(tl.minimum(kv_len, first + 1 + ahead), 0)
        if HAS_WINDOW:
            begin = tl.maximum(first + ahead - window + 1, 0) // BLOCK_N * BLOCK_N
            full_begin = tl.maximum(tl.minimum(first + BLOCK_Q, q_len) + ahead - window, 0)
        if SPLITS_KEYS:
            each = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), splits) * BLOCK_N
            begin += tl.program_id(0) * each
            end = tl.minimum(end, begin + each)
        full_begin = tl.minimum(tl.cdiv(tl.maximum(full_begin, begin), BLOCK_N) * BLOCK_N, tl.maximum(end, begin))
        full_end = tl.maximum(tl.minimum(full_end, end) // BLOCK_N * BLOCK_N, full_begin)
        table = tables + sequence.to(tl.int64) * stride_table
        acc = tl.zeros([BLOCK_M, BLOCK_WIDTH], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        if HAS_WINDOW:
            acc, top, total = walk(
                q, acc, top, total, k_cache, v_cache, k_scale, v_scale, table, kv_head, kv_heads, at, kv_len, begin,
                full_begin, scale, cap, window, WIDTH, BLOCK_WIDTH, BLOCK_N, BLOCK_SIZE, True, HAS_WINDOW, HAS_CAP,
                QUANTISED,
            )  # fmt: skip
        acc, top, total = walk(
            q, acc, top, total, k_cache, v_cache, k_scale, v_scale, table, kv_head, kv_heads, at, kv_len, full_begin,
            full_end, scale, cap, window, WIDTH, BLOCK_WIDTH, BLOCK_N, BLOCK_SIZE, False, HAS_WINDOW, HAS_CAP,
            QUANTISED,
        )  # fmt: skip
        acc, top, total = walk(
            q, acc, top, total, k_cache, v_cache, k_scale, v_scale, table, kv_head, kv_heads, at, kv_len, full_end,
            end, scale, cap, window, WIDTH, BLOCK_WIDTH, BLOCK_N, BLOCK_SIZE, True, HAS_WINDOW, HAS_CAP, QUANTISED,
        )  # fmt: skip
        some = real & (total > 0.0)
        acc = acc / tl.where(some, total, 1.0)[:, None]
        acc = tl.where(some[:, None], acc, 0.0)
        if SPLITS_KEYS:
            part = (tl.program_id(2).to(tl.int64) * q_heads + head) * splits + tl.program_id(0)
            tl.store(out_ptr + part[:, None] * WIDTH + across[None, :], acc, mask=inside & some[:, None])
            lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
            tl.store(lse_ptr + part, lse, mask=real)
        else:
            to = out_ptr + (token * q_heads + head)[:, None] * WIDTH + across[None, :]
            tl.store(to, narrow(acc, out_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class _Call:
    """What one launch needs besides its range of sequences."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    block_tables: torch.Tensor
    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    sm_scale: float
    window: int | None
    softcap: float | None

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k_cache.shape[2]


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
    max_q_len: int,
    num_decodes: int,
) -> torch.Tensor:
    """Decoding sequences first, then the others. Raises ConfigError for heads that are too wide or too many."""
    group = q.shape[1] // k_cache.shape[2]
    if q.shape[2] > _WIDEST or group > 128:
        raise ConfigError(
            f"attention has no kernel for head_dim {q.shape[2]} with {group} query heads to a kv head: at most "
            f"{_WIDEST} and 128; set NYBBLE_TORCH_OPS=torch to run without kernels"
        )
    q = q if q.stride(2) == 1 else q.contiguous()
    tables = block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()
    call = _Call(
        q, k_cache, v_cache, k_scale, v_scale, tables, cu_seqlens_q, kv_lens, sm_scale, window, softcap
    )  # fmt: skip
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    sequences = len(kv_lens)
    decodes = sequences if max_q_len == 1 else num_decodes
    if decodes:
        _decode(call, out, decodes)
    if sequences > decodes:
        _launch(call, out, out, range(decodes, sequences), max_q_len, splits=0)
    return out


def _decode(call: _Call, out: torch.Tensor, sequences: int) -> None:
    """The sequences at the front, which have one query each."""
    capacity = call.block_tables.shape[1] * call.k_cache.shape[1]
    splits = num_splits(sequences * call.k_cache.shape[2], capacity, call.q.device)
    if splits == 1:
        _launch(call, out, out, range(sequences), 1, splits=0)
        return
    shape = (sequences, out.shape[1], splits)
    parts = torch.empty((*shape, out.shape[2]), dtype=torch.float32, device=out.device)
    lse = torch.empty(shape, dtype=torch.float32, device=out.device)
    _launch(call, parts, lse, range(sequences), 1, splits=splits)
    merge_splits(parts, lse, out, call.cu_seqlens_q)


def num_splits(programs: int, capacity: int, device: torch.device) -> int:
    """Pieces of the keys, so that the device has about two programs for each multiprocessor.

    It follows from shapes alone, so that a CUDA graph stays right for any lengths.
    """
    return max(1, min(_MOST_SPLITS, capacity // keys_per_split(), 2 * multiprocessors(device) // programs))


def keys_per_split() -> int:
    """Fewer are not worth a program of their own; in the interpreter few, so that small tests have several."""
    return 32 if interpreted() else _KEYS_PER_SPLIT


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; a number for tests where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _launch(
    call: _Call, out: torch.Tensor, lse: torch.Tensor, sequences: range, max_q_len: int, *, splits: int
) -> None:
    width, group = call.q.shape[2], call.group
    block_m, block_n, warps, stages = _tiles(call, max_q_len)
    block_q = max(1, block_m // group)
    tiles = splits or triton.cdiv(max_q_len, block_q)
    paged_kernel[(tiles, call.k_cache.shape[2], len(sequences))](
        call.q, call.k_cache, call.v_cache, call.k_cache if call.k_scale is None else call.k_scale,
        call.v_cache if call.v_scale is None else call.v_scale, out, lse, call.block_tables, call.cu_seqlens_q,
        call.kv_lens, sequences.start, call.q.stride(0), call.q.stride(1), call.block_tables.stride(0),
        call.q.shape[1], call.k_cache.shape[2], splits, call.sm_scale, call.softcap or 1.0, call.window or 0,
        GROUP=group, WIDTH=width, BLOCK_WIDTH=max(triton.next_power_of_2(width), 16), BLOCK_Q=block_q, BLOCK_M=block_m,
        BLOCK_N=block_n, BLOCK_SIZE=call.k_cache.shape[1], SPLITS_KEYS=splits > 0, HAS_WINDOW=call.window is not None,
        HAS_CAP=call.softcap is not None, QUANTISED=call.k_cache.dtype in QUANTISED_LIMITS, **OPTIONS, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip


def _tiles(call: _Call, max_q_len: int) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps, stages: what fits the registers and the shared memory of a GPU."""
    needed = max(16, triton.next_power_of_2(call.group * max_q_len))
    if interpreted():  # small, so that small tests have several tiles
        return max(16, triton.next_power_of_2(call.group)), 16, 4, 1
    width, wide = triton.next_power_of_2(call.q.shape[2]), call.q.dtype == torch.float32
    if max_q_len == 1:
        return max(16, triton.next_power_of_2(call.group)), 64 if width <= 128 and not wide else 32, 4, 3
    most = 64 if wide or width > 128 else 128
    rows = min(needed, max(most, triton.next_power_of_2(call.group)))
    return rows, 64 if width <= 128 and not wide else 32, 4 if rows <= 64 else 8, 2
