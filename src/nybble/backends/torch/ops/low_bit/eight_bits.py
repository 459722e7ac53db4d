"""Matrices of 8-bit codes whose activations are brought to 8 bits as well, one scale per token.

int8: LLM.int8 of bitsandbytes, whose large inputs are multiplied as floats, and W8A8 of compressed-tensors. float8:
e4m3 with scales per matrix, row or block of 128 inputs.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from nybble.backends.torch.ops.choice import kernels, runs_kernels
from nybble.backends.torch.ops.low_bit.from_weights import on_device
from nybble.backends.torch.ops.low_bit.linear import Linear
from nybble.quant.weights import Float8, GroupedInt, RowInt8

RUN = 128


class EightBitLinear(Linear):
    """weight: int8 or float8_e4m3fn [out, in filled up to whole runs]. scale: float32 [1 or runs, out].

    threshold: inputs at or above it in absolute value are not quantised; 0: all are.
    """

    def __init__(
        self, kind: str, weight: torch.Tensor, scale: torch.Tensor, in_features: int, threshold: float = 0.0
    ) -> None:
        super().__init__(len(weight), in_features)
        self.kind = kind
        self.weight = weight
        self.scale = scale
        self.threshold = threshold

    def parts(self) -> tuple[torch.Tensor, ...]:
        return self.weight, self.scale

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        scale = self.scale.t()
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(RUN, 1)
        return (self.weight.float() * scale)[:, : self.in_features].to(dtype)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if runs_kernels(x):
            fast: torch.Tensor = kernels.product8(x, self.weight, self.scale, self.threshold)
            return fast
        far = x.abs() >= self.threshold if self.threshold > 0 else torch.zeros_like(x, dtype=torch.bool)
        codes, scale = quantised_rows(x.masked_fill(far, 0.0), self.weight.dtype)
        weight = self.decode(torch.float32)
        # Sums of products of codes are exact in float64, as the kernel's are in int32.
        y = F.linear(codes.double(), weight.double()) * scale[:, None].double()
        if self.threshold > 0:
            y += F.linear(x.masked_fill(~far, 0.0).double(), weight.double())
        return y.to(x.dtype)


def quantised_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, in] -> codes of int8 or float8 as float32, and their scales [M]."""
    limit = 127.0 if dtype == torch.int8 else 448.0
    wide = x.float()
    scale = wide.abs().amax(1) / limit
    codes = (wide / torch.where(scale > 0, scale, 1.0)[:, None]).clamp(-limit, limit)
    return codes.round() if dtype == torch.int8 else codes.to(dtype).float(), scale


def from_row_int8(weight: RowInt8, device: torch.device | str) -> EightBitLinear:
    """LLM.int8."""
    scale = (weight.absmax * np.float32(1 / 127)).reshape(1, -1)
    codes = _whole_runs(on_device(weight.codes, device))
    return EightBitLinear("LLM.int8", codes, on_device(scale, device), weight.shape[1], weight.threshold)


def from_int8_rows(weight: GroupedInt, device: torch.device | str) -> EightBitLinear | None:
    """W8A8. None: not eight bits, more than one scale for a row, or zero points."""
    if weight.bits != 8 or weight.scales.shape[1] != 1:
        return None
    if weight.zeros is not None and (weight.zeros != 128).any():
        return None
    codes = on_device((weight.codes ^ np.uint8(128)).view(np.int8), device)
    scale = on_device(weight.scales.astype(np.float32).T, device)
    return EightBitLinear("W8A8", _whole_runs(codes), scale, weight.shape[1])


def from_float8_rows(weight: Float8, device: torch.device | str) -> EightBitLinear | None:
    """FP8 with FP8 activations. None: blocks of other sizes than 128 inputs."""
    rows = len(weight.codes)
    scales = weight.scales.astype(np.float32)
    if weight.block is not None:
        if weight.block[1] != RUN:
            return None
        scales = np.repeat(scales, weight.block[0], axis=0)[:rows]
    scales = np.broadcast_to(scales, (rows, scales.shape[1])).T
    codes = _whole_runs(on_device(weight.codes, device)).view(torch.float8_e4m3fn)
    return EightBitLinear("W8A8-FP8", codes, on_device(scales, device), weight.shape[1])


def _whole_runs(codes: torch.Tensor) -> torch.Tensor:
    return F.pad(codes, (0, -codes.shape[1] % RUN)).contiguous()
