"""From integer codes with scales and zero points, as GPTQ, AWQ and compressed-tensors have them, to rows of blocks.

value = scale * (code - zero). A block holds 128 weights where the groups allow it, 32 otherwise; the scale of a longer
group, or of a whole row, is repeated in each of its blocks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.quant.formats import FORMATS, QuantFormat

BITS = (2, 3, 4, 8)


def pack_grouped(
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.floating],
    zeros: npt.NDArray[np.integer],
    *,
    bits: int,
) -> tuple[QuantFormat, npt.NDArray[np.uint8]]:
    """Blocks of one matrix, and their format.

    codes: [out_features, in_features], each below 2**bits. scales: [out_features, groups], positive or negative; kept
    as float16, with 8 bits as float32. zeros: [out_features, groups], 0 to 2**bits. All groups have in_features /
    groups weights.

    Raises:
        ValueError: the shapes do not fit together, the groups are not multiples of 32 weights, the values are out of
            range, or a scale does not survive float16.
    """
    rows, cols = codes.shape
    groups = scales.shape[1] if scales.ndim == 2 else 0
    if bits not in BITS:
        raise ValueError(f"codes must have 2, 3, 4 or 8 bits, not {bits}")
    if scales.shape != (rows, groups) or zeros.shape != scales.shape or groups == 0 or cols % groups:
        raise ValueError(f"codes {codes.shape} do not go with scales {scales.shape} and zero points {zeros.shape}")
    group_size = cols // groups
    if group_size % 32:
        raise ValueError(f"groups of {group_size} weights are not multiples of 32")
    if codes.size and int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit {bits} bits")
    top = min(1 << bits, 255)
    if zeros.size and not (int(zeros.min()) >= 0 and int(zeros.max()) <= top):
        raise ValueError(f"zero points must lie between 0 and {top}, not {int(zeros.min())} to {int(zeros.max())}")
    block = 128 if group_size % 128 == 0 else 32
    fmt = FORMATS[f"U{bits}_{block}"]
    repeat = group_size // block
    out = np.zeros((rows, cols // block, fmt.block_bytes), np.uint8)
    scale_bytes, header = (4, 8) if bits == 8 else (2, 4)
    stored = _stored(scales, bits)
    out[:, :, :scale_bytes] = np.repeat(stored.view(np.uint8).reshape(rows, groups, scale_bytes), repeat, axis=1)
    out[:, :, scale_bytes] = np.repeat(zeros.astype(np.uint8), repeat, axis=1)
    out[:, :, header:] = pack_bits(codes.reshape(-1, block), bits).reshape(rows, cols // block, -1)
    return fmt, out.reshape(rows, -1)


def pack_bits(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """[n, k] codes -> [n, k * bits / 8]: a stream of bits, lowest bit first."""
    if bits == 8:
        return codes
    each = np.unpackbits(codes[:, :, None], axis=2, count=bits, bitorder="little")
    return np.packbits(each.reshape(len(codes), -1), axis=1, bitorder="little")


def _stored(scales: npt.NDArray[np.floating], bits: int) -> npt.NDArray[np.floating]:
    if bits == 8:
        return np.ascontiguousarray(scales, np.float32)
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(scales, np.float16)
    if not np.isfinite(half).all() or ((half == 0) != (scales == 0)).any():
        raise ValueError("a scale is outside the range of float16")
    return half
