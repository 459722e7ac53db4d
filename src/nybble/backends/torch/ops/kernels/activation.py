"""SwiGLU and GeGLU: activation(gate) * up, one pass over both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import OPTIONS, narrow
from nybble.backends.torch.flash.scores import tanh

_BLOCK = 1024


@triton.jit
def gated_kernel(
    gate_ptr, up_ptr, out_ptr, stride_gate, stride_up, width, IS_SILU: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program has a piece of one row; the rows of gate and up may be halves of longer ones."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_ptr + row * stride_gate + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + at, mask=inside, other=0.0).to(tl.float32)
    if IS_SILU:
        active = gate / (1.0 + tl.exp(-gate))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = 0.5 * gate * (1.0 + tanh(inner))
    tl.store(out_ptr + row * width + at, narrow(active * up, out_ptr.dtype.element_ty), mask=inside)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """[..., ffn_size] of both -> the same."""
    width = gate.shape[-1]
    gates, ups = (x.reshape(-1, width) for x in (gate, up))
    gates, ups = (x if x.stride(1) == 1 else x.contiguous() for x in (gates, ups))
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        gated_kernel[(len(gates), triton.cdiv(width, _BLOCK))](
            gates,
            ups,
            out,
            gates.stride(0),
            ups.stride(0),
            width,
            IS_SILU=kind == "silu",
            BLOCK=_BLOCK,
            **OPTIONS,
            num_warps=4,
        )
    return out
