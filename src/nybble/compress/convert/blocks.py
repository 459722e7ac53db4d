"""Integer codes with scales and zero points as blocks of a GGUF type that means exactly the same values.

value = scale * (code - zero). Which type holds it follows from the differences code - zero, since Q4_0, Q5_0 and Q8_0
mean scale * (q - 8), scale * (q - 16) and scale * q; Q4_1 means scale * q + m and is taken where m = -scale * zero is a
float16. The scale of a group is repeated in each of its blocks of 32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.quant.formats import FORMATS, QuantFormat
from nybble.quant.weights import GroupedInt

BLOCK = 32
# Type -> lowest and highest difference, and what it adds to them.
_CENTRED = {"Q4_0": (-8, 7, 8), "Q5_0": (-16, 15, 16), "Q8_0": (-128, 127, 0)}

Bytes = npt.NDArray[np.uint8]


def gguf_format(weight: GroupedInt) -> QuantFormat:
    """The smallest type that holds the matrix exactly. Raises ValueError that says why none does."""
    inputs = weight.shape[1]
    if weight.g_idx is not None:
        raise ValueError("its groups do not lie in order (act-order, g_idx), and blocks of GGUF do")
    if weight.group_size % BLOCK or inputs % BLOCK:
        raise ValueError(f"groups of {weight.group_size} in rows of {inputs} are not made of whole blocks of {BLOCK}")
    if not exact_in_f16(weight.scales):
        raise ValueError("a scale is not a float16, which is what GGUF keeps scales in")
    differences = _differences(weight)
    low, high = int(differences.min()), int(differences.max())
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0") if weight.bits <= 4 else ("Q8_0",):
        if name == "Q4_1":
            if weight.zeros is not None and exact_in_f16(_offsets(weight)):
                return FORMATS[name]
        elif _CENTRED[name][0] <= low and high <= _CENTRED[name][1]:
            return FORMATS[name]
    raise ValueError(f"its codes less their zero points reach from {low} to {high}, and no GGUF type has that range")


def exact_in_f16(values: npt.NDArray[np.floating]) -> bool:
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16).astype(np.float32) == values).all())


def to_blocks(weight: GroupedInt, fmt: QuantFormat) -> Bytes:
    """[out_features, bytes of a row], for a matrix that `gguf_format` found this type for."""
    rows, cols = weight.shape
    repeat = weight.group_size // BLOCK
    out = np.empty((rows, cols // BLOCK, fmt.block_bytes), np.uint8)
    out[:, :, :2] = _halves(weight.scales, repeat)
    if fmt.name == "Q4_1":
        out[:, :, 2:4] = _halves(_offsets(weight), repeat)
        out[:, :, 4:] = _nibbles(weight.codes.reshape(rows, -1, BLOCK))
        return out.reshape(rows, -1)
    shifted = (_differences(weight) + np.int16(_CENTRED[fmt.name][2])).reshape(rows, -1, BLOCK)
    if fmt.name == "Q8_0":
        out[:, :, 2:] = shifted.astype(np.int8).view(np.uint8)
        return out.reshape(rows, -1)
    codes = shifted.astype(np.uint8)
    if fmt.name == "Q5_0":
        out[:, :, 2:6] = np.packbits(codes >> np.uint8(4), axis=2, bitorder="little")
    out[:, :, -16:] = _nibbles(codes & np.uint8(15))
    return out.reshape(rows, -1)


def _differences(weight: GroupedInt) -> npt.NDArray[np.int16]:
    codes = weight.codes.astype(np.int16)
    if weight.zeros is None:
        return codes - np.int16(1 << (weight.bits - 1))
    return codes - np.repeat(weight.zeros.astype(np.int16), weight.group_size, axis=1)


def _offsets(weight: GroupedInt) -> npt.NDArray[np.float32]:
    """What Q4_1 adds, exact in float32."""
    assert weight.zeros is not None
    return -(weight.scales.astype(np.float32) * weight.zeros.astype(np.float32))


def _halves(values: npt.NDArray[np.floating], repeat: int) -> Bytes:
    half = np.ascontiguousarray(values, np.float16)
    return np.repeat(half.view(np.uint8).reshape(*half.shape, 2), repeat, axis=1)


def _nibbles(codes: Bytes) -> Bytes:
    """[..., 32] -> [..., 16]: the first half of a block in the low nibbles, the second in the high ones."""
    return codes[..., :16] | (codes[..., 16:] << np.uint8(4))
