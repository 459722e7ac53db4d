"""Activations to int8 or float8 with one scale per token, in one pass over each row, just before a product needs them.

With a threshold (LLM.int8: Dettmers et al. 2022, arXiv 2208.07339) the inputs that reach it in absolute value are left
out of the codes, as zeros, and of the scale; the product multiplies them as floats. `marks` says in which runs of
inputs a token has such, so that the others cost nothing. It goes by input and token, where the paper goes by input: so
what a token gives does not depend on the tokens beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import OPTIONS, narrow, nearest

RUN = 128  # inputs of a mark, and of a step of the product


@triton.jit
def quantise_kernel(
    x_ptr, codes_ptr, scale_ptr, marks_ptr, stride_x, k, runs, threshold,
    LIMIT: tl.constexpr, IS_INT: tl.constexpr, HAS_THRESHOLD: tl.constexpr, RUN: tl.constexpr, BLOCK_RUNS: tl.constexpr,
):  # fmt: skip
    """One program has one token. The codes go on with zeros to whole runs."""
    token = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, BLOCK_RUNS)
    at = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    x = tl.load(x_ptr + token * stride_x + at, mask=at < k, other=0.0).to(tl.float32)
    if HAS_THRESHOLD:
        far = tl.abs(x) >= threshold
        tl.store(marks_ptr + token * runs + run, tl.max(far.to(tl.int32), axis=1).to(tl.int8), mask=run < runs)
        x = tl.where(far, 0.0, x)
    scale = tl.max(tl.max(tl.abs(x), axis=1), axis=0) / LIMIT
    codes = x / tl.where(scale > 0.0, scale, 1.0)
    if IS_INT:
        codes = nearest(codes)
    codes = tl.minimum(tl.maximum(codes, -LIMIT), LIMIT)
    to = codes_ptr + token * (runs * RUN) + at
    tl.store(to, narrow(codes, codes_ptr.dtype.element_ty), mask=(run < runs)[:, None])
    tl.store(scale_ptr + token, scale)


def quantise_rows(
    x: torch.Tensor, dtype: torch.dtype, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[M, in] -> codes [M, whole runs], scales float32 [M], marks int8 [M, runs]."""
    runs = triton.cdiv(x.shape[1], RUN)
    codes = torch.empty((len(x), runs * RUN), dtype=dtype, device=x.device)
    scale = torch.empty(len(x), dtype=torch.float32, device=x.device)
    marks = torch.zeros((len(x), runs), dtype=torch.int8, device=x.device)
    limit, is_int = (127.0, True) if dtype == torch.int8 else (448.0, False)
    quantise_kernel[(len(x),)](
        x, codes, scale, marks, x.stride(0), x.shape[1], runs, threshold, LIMIT=limit, IS_INT=is_int,
        HAS_THRESHOLD=threshold > 0, RUN=RUN, BLOCK_RUNS=triton.next_power_of_2(runs), **OPTIONS, num_warps=8,
    )  # fmt: skip
    return codes, scale, marks
