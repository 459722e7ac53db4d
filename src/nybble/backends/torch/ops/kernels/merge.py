"""Decoding's second pass: parts of one query's result over pieces of its keys become the result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import OPTIONS, narrow


@triton.jit
def merge_kernel(
    parts, lse_ptr, out_ptr, cu_q, q_heads, splits, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program has one head of one sequence. A piece without keys has an lse of -inf and no part."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(cu_q + sequence).to(tl.int64)
    if tl.load(cu_q + sequence + 1) > token:
        piece, across = tl.arange(0, BLOCK), tl.arange(0, BLOCK_WIDTH)
        row = (sequence.to(tl.int64) * q_heads + head) * splits
        lse = tl.load(lse_ptr + row + piece, mask=piece < splits, other=float("-inf"))
        top = tl.max(lse, axis=0)
        share = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
        written = (lse > float("-inf"))[:, None] & (across < WIDTH)[None, :]
        part = tl.load(parts + (row + piece)[:, None] * WIDTH + across[None, :], mask=written, other=0.0)
        total = tl.sum(share, axis=0)
        merged = tl.sum(part * share[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
        to = out_ptr + (token * q_heads + head) * WIDTH + across
        tl.store(to, narrow(merged, out_ptr.dtype.element_ty), mask=across < WIDTH)


def merge_splits(parts: torch.Tensor, lse: torch.Tensor, out: torch.Tensor, cu_seqlens_q: torch.Tensor) -> None:
    """parts: float32 [sequences, q_heads, splits, head_dim]; lse: base 2, [sequences, q_heads, splits]."""
    sequences, heads, splits, width = parts.shape
    merge_kernel[(sequences, heads)](
        parts, lse, out, cu_seqlens_q, heads, splits, WIDTH=width, BLOCK_WIDTH=triton.next_power_of_2(width),
        BLOCK=triton.next_power_of_2(splits), **OPTIONS, num_warps=4,
    )  # fmt: skip
