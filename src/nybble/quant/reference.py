"""Readable decoders of every encoding in numpy: what the packed layouts and the kernels are tested against.

Each takes the file's bytes as blocks `[num_blocks, block_bytes]` uint8 and gives float32 `[num_blocks, block_size]`.
All arithmetic is float32, rounded after every operation: `(d * scale) * code`, then minus the rounded `dmin * min`.
Layouts: the GGUF specification of ggml.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from nybble.quant.codebook import FP4_CODES, NF4_CODES
from nybble.quant.formats import QuantFormat
from nybble.quant.weights import E4M3_VALUES

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)
E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.float32)


def _half(blocks: Bytes, offset: int) -> Floats:
    return blocks[:, offset : offset + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[n, bytes] -> [n, 2 * bytes]: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(qh: Bytes) -> Bytes:
    """[n, 4] -> [n, 32]: bit j of the 32-bit word, as 0 or 16."""
    return np.unpackbits(qh, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(b: Bytes) -> Floats:
    return _half(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Bytes) -> Floats:
    return _half(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _half(b, 2)


def _q5_0(b: Bytes) -> Floats:
    return _half(b, 0) * ((_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6])).astype(np.float32) - 16)


def _q5_1(b: Bytes) -> Floats:
    return _half(b, 0) * (_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8])).astype(np.float32) + _half(b, 2)


def _q8_0(b: Bytes) -> Floats:
    return _half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def _iq4_nl(b: Bytes) -> Floats:
    return _half(b, 0) * IQ4_VALUES[_nibbles(b[:, 2:])]


def _mxfp4(b: Bytes) -> Floats:
    exponent = b[:, :1].astype(np.uint32)
    bits = np.where(exponent < 2, np.uint32(0x00200000) << np.minimum(exponent, 1), (exponent - 1) << np.uint32(23))
    return bits.astype(np.uint32).view(np.float32) * E2M1_DOUBLED[_nibbles(b[:, 1:])]


def _bit_fields(packed: Bytes, width: int) -> Bytes:
    """[n, 32 * h] -> [n, h * (8 / width) * 32]: in each run of 32 bytes, field 0 of all, then field 1 of all, ..."""
    runs = packed.reshape(len(packed), -1, 1, 32)
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, -1, 1)
    return ((runs >> shifts) & np.uint8((1 << width) - 1)).reshape(len(packed), -1)


def _scaled(scale: Floats, codes: Floats) -> Floats:
    """scale [n, s] times codes [n, 256], each scale over 256 / s neighbours."""
    n, s = scale.shape
    return (scale[:, :, None] * codes.reshape(n, s, -1)).reshape(n, -1)


def _q2_k(b: Bytes) -> Floats:
    scales, codes = b[:, :16], _bit_fields(b[:, 16:80], 2).astype(np.float32)
    scale = _half(b, 80) * (scales & 15).astype(np.float32)
    minimum = _half(b, 82) * (scales >> 4).astype(np.float32)
    return _scaled(scale, codes) - np.repeat(minimum, 16, axis=1)


def _q3_k(b: Bytes) -> Floats:
    high = _bit_fields(b[:, :32], 1).astype(np.int8)
    codes = _bit_fields(b[:, 32:96], 2).astype(np.int8) - 4 * (1 - high)
    packed = b[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    upper = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = (low | (upper << 4)).astype(np.int8) - 32
    return _scaled(_half(b, 108) * scales.astype(np.float32), codes.astype(np.float32))


def _scale_min(packed: Bytes) -> tuple[Floats, Floats]:
    """12 bytes -> eight six-bit scales and minima of Q4_K and Q5_K."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minimum = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scale.astype(np.float32), minimum.astype(np.float32)


def _with_minima(b: Bytes, codes: Bytes) -> Floats:
    scale, minimum = _scale_min(b[:, 4:16])
    return _scaled(_half(b, 0) * scale, codes.astype(np.float32)) - np.repeat(_half(b, 2) * minimum, 32, axis=1)


def _q4_k(b: Bytes) -> Floats:
    return _with_minima(b, _bit_fields(b[:, 16:], 4))


def _q5_k(b: Bytes) -> Floats:
    return _with_minima(b, _bit_fields(b[:, 48:], 4) | (_bit_fields(b[:, 16:48], 1) << np.uint8(4)))


def _q6_k(b: Bytes) -> Floats:
    n = len(b)
    # In each half of 128 weights, 64 bytes of low nibbles and 32 bytes of upper bits.
    low = np.concatenate([b[:, :128].reshape(n, 2, 64) & 15, b[:, :128].reshape(n, 2, 64) >> 4], axis=2).reshape(n, 256)
    codes = (low | (_bit_fields(b[:, 128:192], 2) << 4)).astype(np.float32) - 32
    return _scaled(_half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32), codes)


def _iq4_xs(b: Bytes) -> Floats:
    n = len(b)
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=2).reshape(n, 8)
    high = np.stack([(b[:, 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(n, 8)
    scales = (low | (high << 4)).astype(np.int8) - 32
    packed = b[:, 8:].reshape(n, 8, 16)
    codes = IQ4_VALUES[np.concatenate([packed & 15, packed >> 4], axis=2).reshape(n, 256)]
    return _scaled(_half(b, 0) * scales.astype(np.float32), codes)


def _grouped(bits: int) -> Callable[[Bytes], Floats]:
    """Blocks of nybble's own: scale, whole zero point, then a stream of codes of `bits` bits, lowest bit first."""
    scale_bytes, header = (4, 8) if bits == 8 else (2, 4)

    def decode(b: Bytes) -> Floats:
        scale = b[:, :4].copy().view(np.float32) if bits == 8 else _half(b, 0)
        # Negated as an integer: a zero point of 0 must give a minimum of +0.
        minimum = scale * (-b[:, scale_bytes : scale_bytes + 1].astype(np.int16)).astype(np.float32)
        return scale * unpack_bits(b[:, header:], bits).astype(np.float32) + minimum

    return decode


def _codebook(table: npt.NDArray[np.int16]) -> Callable[[Bytes], Floats]:
    """Blocks of nybble's own: scale, then nibbles that index a table, the first weight in the low half."""

    def decode(b: Bytes) -> Floats:
        return b[:, :4].copy().view(np.float32) * table[unpack_bits(b[:, 4:], 4)].astype(np.float32)

    return decode


def _float8(b: Bytes) -> Floats:
    """Blocks of nybble's own: scale, then the bits of E4M3 numbers."""
    return b[:, :4].copy().view(np.float32) * E4M3_VALUES[b[:, 4:]]


def unpack_bits(stream: Bytes, bits: int) -> Bytes:
    """[n, bytes] -> [n, 8 * bytes / bits]: the codes of a stream of bits, lowest bit first."""
    each = np.unpackbits(stream, axis=1, bitorder="little").reshape(len(stream), -1, bits)
    return np.packbits(each, axis=2, bitorder="little")[:, :, 0]


def _f32(b: Bytes) -> Floats:
    return b.copy().view(np.float32)


def _f16(b: Bytes) -> Floats:
    return b.copy().view(np.float16).astype(np.float32)


def _bf16(b: Bytes) -> Floats:
    return (b.copy().view(np.uint16).astype(np.uint32) << 16).view(np.float32)


_DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
    **{f"U{bits}_{group}": _grouped(bits) for bits in (2, 3, 4, 8) for group in (32, 128)},
    "NF4_64": _codebook(NF4_CODES), "FP4_64": _codebook(FP4_CODES), "F8_32": _float8, "F8_128": _float8,
}  # fmt: skip


def dequantize(fmt: QuantFormat, data: bytes | memoryview) -> Floats:
    """The weights in `data` (whole blocks of `fmt`) as a flat float32 array.

    Raises ValueError if there is no decoder for the encoding or `data` ends inside a block.
    """
    decoder = _DECODERS.get(fmt.name)
    if decoder is None:
        raise ValueError(f"there is no decoder for {fmt.name}")
    raw = np.frombuffer(data, dtype=np.uint8)
    if raw.size % fmt.block_bytes:
        raise ValueError(f"{raw.size} bytes are not whole {fmt.name} blocks of {fmt.block_bytes}")
    if raw.size == 0:
        return np.zeros(0, dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.ascontiguousarray(decoder(raw.reshape(-1, fmt.block_bytes))).reshape(-1)
