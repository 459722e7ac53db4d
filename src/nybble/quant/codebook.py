"""From NF4 and FP4, as bitsandbytes has them, to rows of blocks.

value = scale * code, with one of 16 codes per weight and a float32 scale for 64 of them. The codes have 16 bits, so
that kernels multiply them as two planes of eight: NF4 with a unit of 1 / 31908 of the block's largest value, which
leaves every value within 8e-6 of its own, the best of all units; FP4 with 1 / 32448, which is exact.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from nybble.quant.formats import FORMATS, QuantFormat

BLOCK = 64
UNITS = {"nf4": 31908, "fp4": 32448}
# The native core has the same numbers in quant/raw_codes.h.
NF4_CODES = np.array(
    [-31908, -22214, -16754, -12601, -9076, -5896, -2905, 0, 2539, 5135, 7853, 10782, 14062, 17952, 23068, 31908],
    np.int16,
)
FP4_CODES = np.array(
    [0, 169, 21632, 32448, 10816, 16224, 5408, 8112, 0, -169, -21632, -32448, -10816, -16224, -5408, -8112], np.int16
)


def pack_codebook(
    table: Literal["nf4", "fp4"], codes: npt.NDArray[np.uint8], absmax: npt.NDArray[np.float32], block: int
) -> tuple[QuantFormat, npt.NDArray[np.uint8]]:
    """Blocks of one matrix, and their format.

    codes: [out_features, in_features], each below 16. absmax: one for each `block` neighbours, row by row.

    Raises:
        ValueError: the rows or the blocks are not multiples of 64 weights, or there are too few absmax.
    """
    rows, cols = codes.shape
    if cols % BLOCK or block % BLOCK:
        raise ValueError(f"rows of {cols} weights in blocks of {block} are not multiples of {BLOCK}")
    count = rows * cols // BLOCK
    if len(absmax) != -(-rows * cols // block):
        raise ValueError(f"{len(absmax)} scales do not go with {rows} x {cols} weights in blocks of {block}")
    fmt = FORMATS[f"{table.upper()}_{BLOCK}"]
    out = np.empty((count, fmt.block_bytes), np.uint8)
    scales = np.repeat(absmax.astype(np.float32) / np.float32(UNITS[table]), block // BLOCK)[:count]
    out[:, :4] = scales.view(np.uint8).reshape(count, 4)
    pairs = codes.reshape(count, BLOCK // 2, 2)
    out[:, 4:] = pairs[:, :, 0] | pairs[:, :, 1] << np.uint8(4)
    return fmt, out.reshape(rows, -1)
