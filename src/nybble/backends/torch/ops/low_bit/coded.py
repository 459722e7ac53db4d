"""A matrix of codes with scales, multiplied by activations that stay floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from nybble.backends.torch.ops.choice import kernels, runs_kernels
from nybble.backends.torch.ops.low_bit.linear import Linear
from nybble.backends.torch.ops.low_bit.planes import Layout

# What a code means:
#   int    scale * (code - zero), one scale for `group` inputs of a row
#   affine scale * code + minimum, both float16 of `group` inputs (Q4_1, Q5_1)
#   k      d * scale * code - dmin * min, with 6-bit scales and minima of 32 inputs and d, dmin of 256 (Q4_K, Q5_K)
#   k2     d * scale * code - dmin * min, with 4-bit scales and minima of 16 inputs and d, dmin of 256 (Q2_K)
#   k16    d * scale * (code - middle), with 8-bit scales of 16 inputs and d of 256 (Q3_K, Q6_K)
#   table  scale * table[code]
#   ktable d * scale * table[code], with 8-bit scales of 32 inputs and d of 256 (IQ4_XS)
#   e4m3   scale * code, read as float8_e4m3fn
Meaning = Literal["int", "affine", "k", "k2", "k16", "table", "ktable", "e4m3"]


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix [out, in] in planes. Everything beside the codes lies with the rows next to each other: [..., out].

    scale: [groups, out] float16 or float32; with `k`..., d [in / 256, out] float16. zero: uint8 or int16 [groups,
    out], None: `middle` everywhere. minimum: `k` and `k2`: dmin [in / 256, out]; `affine`: float16 [groups, out].
    packed: `k`: the 12 bytes of scales and minima, uint8 [in / 256, 12, out]; `k2`: a scale in the lower half of a
    byte and a minimum in the upper one, uint8 [in / 16, out]; `k16`, `ktable`: int8 [in / group, out]. table: float32
    [16], and table16, the same in float16: two bytes a number are looked up in the first-level cache, where Triton
    would copy four to shared memory one by one.
    """

    meaning: Meaning
    layout: Layout
    group: int
    low: torch.Tensor
    high: torch.Tensor | None
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    middle: int = 0
    minimum: torch.Tensor | None = None
    packed: torch.Tensor | None = None
    table: torch.Tensor | None = None
    table16: torch.Tensor | None = None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        every = (self.low, self.high, self.scale, self.zero, self.minimum, self.packed, self.table, self.table16)
        return tuple(one for one in every if one is not None)


class CodedLinear(Linear):
    """order: the input that stands at each place of the matrix, where that is not its own (act-order)."""

    def __init__(self, kind: str, codes: Codes, in_features: int, order: torch.Tensor | None = None) -> None:
        super().__init__(codes.low.shape[0], in_features)
        self.kind = kind
        self.codes = codes
        self.order = order

    def parts(self) -> tuple[torch.Tensor, ...]:
        return (*self.codes.tensors(), *(() if self.order is None else (self.order,)))

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if not runs_kernels(x):
            return F.linear(x, self.decode(x.dtype))
        y: torch.Tensor = kernels.product(x if self.order is None else x.index_select(1, self.order), self.codes)
        return y

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        values = decode(self.codes, self.in_features)
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(1, self.order, values)
        return values.to(dtype)


def decode(codes: Codes, in_features: int) -> torch.Tensor:
    """float32 [out, in], the inputs in the order of the matrix."""
    q = codes.layout.unpack(codes.low, codes.high, in_features)
    scale = codes.scale.float()
    if codes.meaning == "table":
        assert codes.table is not None
        return codes.table[q.int()] * _spread(scale, codes.group, in_features)
    if codes.meaning == "e4m3":
        return q.view(torch.float8_e4m3fn).float() * _spread(scale, codes.group, in_features)
    if codes.meaning == "int":
        zero = codes.middle if codes.zero is None else _spread(codes.zero.float(), codes.group, in_features)
        return (q.float() - zero) * _spread(scale, codes.group, in_features)
    if codes.meaning == "affine":
        assert codes.minimum is not None
        minimum = _spread(codes.minimum.float(), codes.group, in_features)
        return q.float() * _spread(scale, codes.group, in_features) + minimum
    assert codes.packed is not None
    if codes.meaning in ("k16", "ktable"):
        small = scale.repeat_interleave(256 // codes.group, 0) * codes.packed.float()
        values = q.float() - codes.middle if codes.table is None else codes.table[q.int()]
        return values * _spread(small, codes.group, in_features)
    assert codes.minimum is not None
    if codes.meaning == "k2":
        factor = (codes.packed & 15).float() * scale.repeat_interleave(16, 0)
        offset = (codes.packed >> 4).float() * codes.minimum.float().repeat_interleave(16, 0)
        return q.float() * _spread(factor, 16, in_features) - _spread(offset, 16, in_features)
    first, second, third = codes.packed[:, 0:4], codes.packed[:, 4:8], codes.packed[:, 8:12]
    factor = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], dim=1).float() * scale[:, None]
    offset = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], dim=1).float() * codes.minimum.float()[:, None]
    return q.float() * _spread(factor.flatten(0, 1), 32, in_features) - _spread(offset.flatten(0, 1), 32, in_features)


def _spread(groups: torch.Tensor, size: int, in_features: int) -> torch.Tensor:
    """[groups, out] -> [out, in]."""
    return groups.t().repeat_interleave(size, 1)[:, :in_features]
