"""Bytes of GGUF blocks from their codes and scales, and the scales back: the inverse of `nybble.quant.reference`.

Layouts: the GGUF specification of ggml. A block of the simple types has one scale (and one minimum); one of 256 weights
has a scale of scales in float16 and a small whole number for each 16 or 32 weights, and the same for minima.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.quant.formats import QuantFormat

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Blocks:
    """value = d * scale * code - (dmin * minimum), with code counted from `Layout.low`.

    d, dmin: [n], float16 values. scales, minima: [n, parts], whole numbers; ones where a type has none of its own.
    codes: [n, block_size]. dmin and minima are None where a type has no minima.
    """

    d: Floats
    scales: Ints
    codes: Ints
    dmin: Floats | None = None
    minima: Ints | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """A type. part: weights per scale; low, high: of the codes; scale_range, minimum_range: of the whole numbers, None
    where d (and dmin) stand alone."""

    part: int
    low: int
    high: int
    scale_range: tuple[int, int] | None = None
    minimum_range: tuple[int, int] | None = None
    has_minimum: bool = False


LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout(32, -8, 7),
    "Q5_0": Layout(32, -16, 15),
    "Q8_0": Layout(32, -127, 127),
    "Q4_1": Layout(32, 0, 15, has_minimum=True),
    "Q5_1": Layout(32, 0, 31, has_minimum=True),
    "Q2_K": Layout(16, 0, 3, (0, 15), (0, 15), has_minimum=True),
    "Q3_K": Layout(16, -4, 3, (-32, 31)),
    "Q4_K": Layout(32, 0, 15, (0, 63), (0, 63), has_minimum=True),
    "Q5_K": Layout(32, 0, 31, (0, 63), (0, 63), has_minimum=True),
    "Q6_K": Layout(16, -32, 31, (-128, 127)),
}


def pack(fmt: QuantFormat, blocks: Blocks) -> Bytes:
    """[n, block_bytes]."""
    return np.ascontiguousarray(np.concatenate(_PACK[fmt.name](blocks), axis=1))


def unpack_scales(fmt: QuantFormat, data: Bytes) -> Blocks:
    """Of blocks [n, block_bytes]; the codes are left out."""
    layout = LAYOUTS[fmt.name]
    d = _read_half(data, _AT[fmt.name][0])
    ones = np.ones((len(data), 1), np.int16)
    none = np.zeros((len(data), 0), np.int16)
    dmin = _read_half(data, _AT[fmt.name][1]) if layout.has_minimum else None
    if layout.scale_range is None:
        # The simple types add their minimum, here it is taken away.
        return Blocks(d, ones, none, None if dmin is None else -dmin, None if dmin is None else ones)
    scales, minima = _SCALES[fmt.name](data)
    return Blocks(d, scales, none, dmin, minima)


# Where d and dmin (or the minimum) lie.
_AT = {
    "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def _read_half(data: Bytes, at: int) -> Floats:
    return data[:, at : at + 2].copy().view(np.float16)[:, 0].astype(np.float32)


def _half(values: Floats | None) -> Bytes:
    assert values is not None
    data: Bytes = np.ascontiguousarray(values, np.float16)[:, None].view(np.uint8)
    return data


def _nibbles(codes: Ints) -> Bytes:
    """[n, 2 k] -> [n, k]: the first half low, the second high."""
    half = codes.shape[1] // 2
    return (codes[:, :half] | (codes[:, half:] << 4)).astype(np.uint8)


def _fields(codes: Ints, width: int) -> Bytes:
    """[n, h * (8 / width) * 32] -> [n, 32 * h]: field 0 of 32 bytes, then field 1 of them, ..."""
    each = codes.reshape(len(codes), -1, 8 // width, 32)
    shifts = np.arange(0, 8, width, dtype=np.int16).reshape(1, 1, -1, 1)
    fields: Bytes = np.bitwise_or.reduce(each << shifts, axis=2).astype(np.uint8).reshape(len(codes), -1)
    return fields


def _bits(codes: Ints) -> Bytes:
    """[n, 32] of 0 and 1 -> [n, 4]."""
    return np.packbits(codes.astype(np.uint8), axis=1, bitorder="little")


def _q4_0(b: Blocks) -> list[Bytes]:
    return [_half(b.d), _nibbles(b.codes + 8)]


def _q4_1(b: Blocks) -> list[Bytes]:
    return [_half(b.d), _half(_negated(b)), _nibbles(b.codes)]


def _q5_0(b: Blocks) -> list[Bytes]:
    codes = b.codes + 16
    return [_half(b.d), _bits(codes >> 4), _nibbles(codes & 15)]


def _q5_1(b: Blocks) -> list[Bytes]:
    return [_half(b.d), _half(_negated(b)), _bits(b.codes >> 4), _nibbles(b.codes & 15)]


def _negated(b: Blocks) -> Floats:
    assert b.dmin is not None
    return np.negative(b.dmin)


def _q8_0(b: Blocks) -> list[Bytes]:
    return [_half(b.d), b.codes.astype(np.int8).view(np.uint8)]


def _q2_k(b: Blocks) -> list[Bytes]:
    assert b.minima is not None
    scales = (b.scales | (b.minima << 4)).astype(np.uint8)
    return [scales, _fields(b.codes, 2), _half(b.d), _half(b.dmin)]


def _q3_k(b: Blocks) -> list[Bytes]:
    codes, scales = b.codes + 4, b.scales + 32
    upper = scales >> 4
    high = upper[:, :4] | (upper[:, 4:8] << 2) | (upper[:, 8:12] << 4) | (upper[:, 12:] << 6)
    packed = np.concatenate([_nibbles(scales & 15), high.astype(np.uint8)], axis=1)
    return [_fields(codes >> 2, 1), _fields(codes & 3, 2), packed, _half(b.d)]


def _scale_min(b: Blocks) -> Bytes:
    """Eight six-bit scales and minima of Q4_K and Q5_K in 12 bytes."""
    assert b.minima is not None
    first = (b.scales[:, :4] & 63) | (b.scales[:, 4:] >> 4 << 6)
    second = (b.minima[:, :4] & 63) | (b.minima[:, 4:] >> 4 << 6)
    third = (b.scales[:, 4:] & 15) | ((b.minima[:, 4:] & 15) << 4)
    return np.concatenate([first, second, third], axis=1).astype(np.uint8)


def _q4_k(b: Blocks) -> list[Bytes]:
    return [_half(b.d), _half(b.dmin), _scale_min(b), _fields(b.codes, 4)]


def _q5_k(b: Blocks) -> list[Bytes]:
    return [_half(b.d), _half(b.dmin), _scale_min(b), _fields(b.codes >> 4, 1), _fields(b.codes & 15, 4)]


def _q6_k(b: Blocks) -> list[Bytes]:
    codes = b.codes + 32
    halves = (codes & 15).reshape(len(codes), 2, 128)
    low = (halves[:, :, :64] | (halves[:, :, 64:] << 4)).astype(np.uint8).reshape(len(codes), 128)
    return [low, _fields(codes >> 4, 2), b.scales.astype(np.int8).view(np.uint8), _half(b.d)]


_PACK: dict[str, Callable[[Blocks], list[Bytes]]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip


def _q2_k_scales(data: Bytes) -> tuple[Ints, Ints | None]:
    packed = data[:, :16].astype(np.int16)
    return packed & 15, packed >> 4


def _q3_k_scales(data: Bytes) -> tuple[Ints, Ints | None]:
    packed = data[:, 96:108].astype(np.int16)
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    upper = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    return (low | (upper << 4)) - 32, None


def _k_scales(data: Bytes) -> tuple[Ints, Ints | None]:
    packed = data[:, 4:16].astype(np.int16)
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    return scales, np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)


def _q6_k_scales(data: Bytes) -> tuple[Ints, Ints | None]:
    return data[:, 192:208].view(np.int8).astype(np.int16), None


_SCALES: dict[str, Callable[[Bytes], tuple[Ints, Ints | None]]] = {
    "Q2_K": _q2_k_scales, "Q3_K": _q3_k_scales, "Q4_K": _k_scales, "Q5_K": _k_scales, "Q6_K": _q6_k_scales,
}  # fmt: skip
