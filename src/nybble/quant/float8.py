"""From FP8 (E4M3), as compressed-tensors and DeepSeek's folders have it, to rows of blocks.

value = scale * code. A block holds 128 weights where rows and scales allow it, 32 otherwise; a scale that holds for
more of them, for a row or for the whole matrix, is repeated in each of its blocks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.quant.formats import FORMATS, QuantFormat

_LARGEST_SCALE = np.float32(2.0**119)  # kernels multiply it by 256


def pack_float8(
    codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], block: tuple[int, int] | None
) -> tuple[QuantFormat, npt.NDArray[np.uint8]]:
    """Blocks of one matrix, and their format.

    codes: [out_features, in_features], the bits of float8_e4m3fn. scales: [1 or out_features, 1], or one per `block`
    rows and columns.

    Raises:
        ValueError: rows or blocks are not multiples of 32 weights, a code is NaN, or a scale is too large.
    """
    rows, cols = codes.shape
    across = cols if block is None else block[1]
    width = next((n for n in (128, 32) if cols % n == 0 and across % n == 0), None)
    if width is None:
        raise ValueError(f"rows of {cols} weights with scales for {across} are not multiples of 32")
    if ((codes & 127) == 127).any():
        raise ValueError("a code is not a number")
    if not (np.abs(scales) <= _LARGEST_SCALE).all():
        raise ValueError("a scale is too large")
    fmt = FORMATS[f"F8_{width}"]
    if block is not None:
        scales = np.repeat(np.repeat(scales, block[0], axis=0)[:rows], across // width, axis=1)[:, : cols // width]
    out = np.empty((rows, cols // width, fmt.block_bytes), np.uint8)
    each = np.broadcast_to(scales.astype(np.float32), (rows, cols // width))
    out[:, :, :4] = np.ascontiguousarray(each).view(np.uint8).reshape(rows, -1, 4)
    out[:, :, 4:] = codes.reshape(rows, -1, width)
    return fmt, out.reshape(rows, -1)
