"""Random quantised matrices, as a checkpoint hands them to the backend."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nybble.checkpoint import Tensor
from nybble.quant.formats import FORMATS
from nybble.quant.weights import Codebook4, Float8, GroupedInt, PackedWeight, RowInt8

ROWS = 37
_SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "MXFP4": (),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_XS": (0,),
}  # fmt: skip


def blocks(name: str, rows: int = ROWS, columns: int = 512) -> Tensor:
    """Random bits with scales of a likely size."""
    rng, fmt = np.random.default_rng(), FORMATS[name]
    data = rng.integers(0, 256, (rows, columns // fmt.block_size, fmt.block_bytes), dtype=np.uint8)
    if name == "MXFP4":  # exponents
        data[:, :, 0] = rng.integers(110, 130, data.shape[:2])
    for offset in _SCALES[name]:
        scale = (rng.standard_normal((*data.shape[:2], 1)) * 0.01).astype(np.float16)
        data[:, :, offset : offset + 2] = scale.view(np.uint8)
    return Tensor("layers.0.ffn.up", (rows, columns), fmt, memoryview(data.tobytes()))


def packed(weight: PackedWeight) -> Tensor:
    return Tensor("layers.0.ffn.up", weight.shape, FORMATS["U8"], memoryview(b""), packed=lambda: weight)


def grouped(bits: int, group: int, columns: int, *, zeros: bool, act_order: bool = False) -> GroupedInt:
    rng, groups = np.random.default_rng(), columns // group
    codes = rng.integers(0, 1 << bits, (ROWS, columns), dtype=np.uint8)
    scales = rng.standard_normal((ROWS, groups)).astype(np.float16)
    points = rng.integers(0, (1 << bits) + 1, (ROWS, groups)).astype(np.int16) if zeros else None
    order = (rng.permutation(columns) // group).astype(np.int32) if act_order else None
    return GroupedInt(bits, group, codes, scales, points, order)


def codebook(table: str, columns: int = 192) -> Codebook4:
    rng = np.random.default_rng()
    codes = rng.integers(0, 16, (ROWS, columns), dtype=np.uint8)
    return Codebook4(table, codes, rng.random(ROWS * columns // 64).astype(np.float32))  # type: ignore[arg-type]


def float8(scales: tuple[int, int], block: tuple[int, int] | None = None, columns: int = 300) -> Float8:
    rng = np.random.default_rng()
    codes = rng.integers(0, 256, (ROWS, columns), dtype=np.uint8)
    codes[(codes & 127) == 127] = 0  # NaN
    return Float8(codes, (rng.random(scales) * 0.01).astype(np.float32), block)


def row_int8(threshold: float, columns: int = 300) -> RowInt8:
    rng = np.random.default_rng()
    codes = rng.integers(-127, 128, (ROWS, columns)).astype(np.int8)
    return RowInt8(codes, rng.random(ROWS).astype(np.float32), threshold)


def float_activation_cases() -> Iterator[tuple[str, Tensor]]:
    """Matrices of every encoding that is multiplied by floats."""
    for name in ("Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"):
        yield name, blocks(name)
    for name in ("Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4"):
        yield name, blocks(name, columns=96)
    yield "W2 g32", packed(grouped(2, 32, 160, zeros=True))
    yield "W3 g64", packed(grouped(3, 64, 320, zeros=True))
    yield "W3 g96", packed(grouped(3, 96, 192, zeros=False))
    yield "W4 g32", packed(grouped(4, 32, 160, zeros=True))
    yield "W4 g128", packed(grouped(4, 128, 384, zeros=False))
    yield "W4 row", packed(grouped(4, 100, 100, zeros=True))
    yield "W4 act-order", packed(grouped(4, 32, 96, zeros=True, act_order=True))
    yield "W5 g32", packed(grouped(5, 32, 96, zeros=True))
    yield "W8 g128", packed(grouped(8, 128, 256, zeros=True))
    yield "NF4", packed(codebook("nf4"))
    yield "FP4", packed(codebook("fp4"))
    yield "FP8 row", packed(float8((ROWS, 1)))
    yield "FP8 matrix", packed(float8((1, 1)))
    yield "FP8 blocks", packed(float8((3, 5), (16, 64)))


def eight_bit_cases() -> Iterator[tuple[str, Tensor, str]]:
    """Matrices whose activations are quantised as well, and what to ask for."""
    yield "LLM.int8", packed(row_int8(6.0)), "auto"
    yield "LLM.int8 without threshold", packed(row_int8(0.0)), "auto"
    yield "W8A8", packed(grouped(8, 300, 300, zeros=False)), "auto"
    yield "FP8 row", packed(float8((ROWS, 1))), "float8"
    yield "FP8 matrix", packed(float8((1, 1))), "float8"
    yield "FP8 blocks", packed(float8((3, 3), (16, 128))), "float8"
