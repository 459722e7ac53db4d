"""Weights as the quantised safetensors dialects mean them: plain arrays, taken out of whatever a file packs them into.

Each class holds one matrix [out_features, in_features] and decodes it to the float32 values that its dialect defines.
Kernels pack from these arrays; files are written from them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# The 16 values of each 4-bit codebook, by code. NF4: quantiles of a normal distribution (Dettmers et al. 2023, arXiv
# 2305.14314); FP4: sign, two bits of exponent and one of mantissa, in units of the largest value.
NF4_VALUES: Floats = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
_FP4_HALF = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
FP4_VALUES: Floats = np.concatenate([_FP4_HALF, 0 - _FP4_HALF])  # bitsandbytes has +0 twice, not -0
CODEBOOKS: dict[str, Floats] = {"nf4": NF4_VALUES, "fp4": FP4_VALUES}

_INT8_STEP = np.float32(1.0 / 127.0)


@dataclass(frozen=True, slots=True)
class GroupedInt:
    """value = scale * (code - zero), with a scale and a zero point for each group of inputs of each row.

    codes: uint8 [out, in], each below 2**bits. scales: float16 or float32 [out, groups]. zeros: [out, groups], None
    where every one of them is 2**(bits - 1). g_idx: int32 [in], the group of each input; None: input // group_size.
    group_size: inputs per group; in_features where a row is one group.
    """

    bits: int
    group_size: int
    codes: Codes
    scales: npt.NDArray[np.floating]
    zeros: npt.NDArray[np.integer] | None = None
    g_idx: npt.NDArray[np.int32] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def groups(self) -> npt.NDArray[np.int32]:
        """The group of each input."""
        if self.g_idx is not None:
            return self.g_idx
        return (np.arange(self.codes.shape[1], dtype=np.int32) // self.group_size).astype(np.int32)

    def decode(self) -> Floats:
        """The product is exact in float32 for scales of 16 bits."""
        groups = self.groups()
        zeros = 1 << (self.bits - 1) if self.zeros is None else self.zeros.astype(np.int16)[:, groups]
        values: Floats = (self.codes.astype(np.int16) - zeros).astype(np.float32)
        values *= self.scales.astype(np.float32)[:, groups]
        return values

    def rows(self, begin: int, end: int) -> GroupedInt:
        zeros = None if self.zeros is None else self.zeros[begin:end]
        return replace(self, codes=self.codes[begin:end], scales=self.scales[begin:end], zeros=zeros)


@dataclass(frozen=True, slots=True)
class Codebook4:
    """value = table[code] * absmax, with one absmax per `block` neighbours of the matrix read row by row.

    codes: uint8 [out, in], below 16. absmax: float32 [ceil(out * in / block)]; what a file keeps in 8 bits (double
    quantisation) is decoded already.
    """

    table: Literal["nf4", "fp4"]
    codes: Codes
    absmax: Floats
    block: int = 64

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def decode(self) -> Floats:
        flat = CODEBOOKS[self.table][self.codes.reshape(-1)]
        flat *= np.repeat(self.absmax, self.block)[: flat.size]
        return flat.reshape(self.codes.shape)

    def rows(self, begin: int, end: int) -> Codebook4:
        """Raises ValueError if a block would be cut."""
        width = self.codes.shape[1]
        first, last = begin * width, end * width
        if first % self.block or (last % self.block and end != len(self.codes)):
            raise ValueError(f"rows {begin} to {end} of {width} weights cut a block of {self.block}")
        absmax = self.absmax[first // self.block : -(-last // self.block)]
        return replace(self, codes=self.codes[begin:end], absmax=absmax)


@dataclass(frozen=True, slots=True)
class RowInt8:
    """LLM.int8: value = code * absmax / 127, with one absmax per row.

    codes: int8 [out, in]. absmax: float32 [out]. threshold: inputs at or above it in absolute value are multiplied in
    16 bits, outside of the integer product; 0: none.
    """

    codes: npt.NDArray[np.int8]
    absmax: Floats
    threshold: float = 6.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def decode(self) -> Floats:
        values: Floats = self.codes.astype(np.float32)
        values *= self.absmax[:, None]
        values *= _INT8_STEP
        return values

    def rows(self, begin: int, end: int) -> RowInt8:
        return replace(self, codes=self.codes[begin:end], absmax=self.absmax[begin:end])


@dataclass(frozen=True, slots=True)
class Float8:
    """value = e4m3 code * scale.

    codes: uint8 [out, in], the bits of float8_e4m3fn. scales: float32 [1 or out, 1], or one per block of `block` rows
    and columns.
    """

    codes: Codes
    scales: Floats
    block: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def decode(self) -> Floats:
        values: Floats = E4M3_VALUES[self.codes]
        scales = self.scales
        if self.block is not None:
            scales = np.repeat(np.repeat(scales, self.block[0], axis=0), self.block[1], axis=1)
            scales = scales[: values.shape[0], : values.shape[1]]
        values *= scales
        return values

    def rows(self, begin: int, end: int) -> Float8:
        """Raises ValueError if a block would be cut."""
        scales = self.scales
        if self.block is not None:
            if begin % self.block[0] or (end % self.block[0] and end != len(self.codes)):
                raise ValueError(f"rows {begin} to {end} cut a block of {self.block[0]} rows")
            scales = scales[begin // self.block[0] : -(-end // self.block[0])]
        elif len(scales) > 1:
            scales = scales[begin:end]
        return replace(self, codes=self.codes[begin:end], scales=scales)


PackedWeight = GroupedInt | Codebook4 | RowInt8 | Float8


def _e4m3_values() -> Floats:
    """Sign, four bits of exponent with bias 7, three of mantissa; no infinities, 0x7f and 0xff are NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code & 128, -value, value).astype(np.float32)


E4M3_VALUES: Floats = _e4m3_values()
