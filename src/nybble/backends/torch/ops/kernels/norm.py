"""RMSNorm and the residual sum before it in one pass: every number is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import OPTIONS, narrow
from nybble.core.errors import ConfigError

WIDEST = 32768


@triton.jit
def norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, stride_x, stride_residual, width, eps,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program has one row, which stays in registers."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    wide = tl.load(x_ptr + row * stride_x + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        wide += tl.load(residual_ptr + row * stride_residual + at, mask=inside, other=0.0).to(tl.float32)
        total = narrow(wide, total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * width + at, total, mask=inside)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + at, narrow(wide * scale * weight, out_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, x + residual). Raises ConfigError for rows that do not fit one program's registers."""
    width = x.shape[-1]
    if width > WIDEST:
        raise ConfigError(f"rms_norm has no kernel for rows of {width} values, at most {WIDEST}")
    flat = _rows(x)
    added = None if residual is None else _rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    block = triton.next_power_of_2(width)
    if x.numel():
        norm_kernel[(len(flat),)](
            flat, flat if added is None else added, weight, out, total, flat.stride(0),
            0 if added is None else added.stride(0), width, eps, ADDS=residual is not None, BLOCK=block,
            **OPTIONS, num_warps=min(max(block // 512, 1), 16),
        )  # fmt: skip
    return out, total


def _rows(x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
