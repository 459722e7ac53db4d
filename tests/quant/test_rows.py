"""What a safetensors folder packs comes out of the kernels' blocks with the values that its dialect gives it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from nybble import _native
from nybble.quant.reference import dequantize
from nybble.quant.rows import to_rows
from nybble.quant.weights import Codebook4, Float8, GroupedInt, PackedWeight, RowInt8

pytestmark = pytest.mark.unit
ROWS, COLS = 19, 384
rng = np.random.default_rng(3)


def grouped(bits: int, group: int, **changes: object) -> GroupedInt:
    codes = rng.integers(0, 1 << bits, (ROWS, COLS)).astype(np.uint8)
    scales = rng.normal(0, 0.02, (ROWS, COLS // group)).astype(np.float16)
    return GroupedInt(bits, group, codes, scales, **changes)  # type: ignore[arg-type]


def codebook(table: Literal["nf4", "fp4"], block: int) -> Codebook4:
    codes = rng.integers(0, 16, (ROWS, COLS)).astype(np.uint8)
    absmax = rng.uniform(0.01, 0.1, -(-ROWS * COLS // block)).astype(np.float32)
    return Codebook4(table, codes, absmax, block)


def both_decoders(weight: PackedWeight) -> tuple[str, np.ndarray]:
    fmt, data, order = to_rows(weight)
    assert order is None
    assert data.shape == (ROWS, fmt.row_bytes(COLS))
    values = dequantize(fmt, data.tobytes()).reshape(ROWS, COLS)
    np.testing.assert_array_equal(_native.pack_roundtrip(fmt.name, data.tobytes(), ROWS, COLS), values)
    return fmt.name, values


@pytest.mark.parametrize(("bits", "group", "name"), [(4, 128, "U4_128"), (3, 32, "U3_32"), (2, 64, "U2_32")])
def test_integers_are_exact(bits: int, group: int, name: str) -> None:
    for weight in (
        grouped(bits, group),
        grouped(bits, group, zeros=rng.integers(0, 1 << bits, (ROWS, COLS // group))),
        grouped(bits, group, g_idx=(np.arange(COLS) // group).astype(np.int32)),
    ):
        found, values = both_decoders(weight)
        assert found == name
        assert (values == weight.decode()).all()


def test_whole_rows() -> None:
    weight = grouped(8, COLS)
    found, values = both_decoders(weight)
    assert found == "U8_128"
    assert (values == weight.decode()).all()


@pytest.mark.parametrize("zeros", [None, rng.integers(0, 16, (ROWS, COLS // 32))])
def test_scattered_groups_are_brought_together(zeros: np.ndarray | None) -> None:
    weight = grouped(4, 32, zeros=zeros, g_idx=rng.permutation(np.arange(COLS) // 32).astype(np.int32))
    fmt, data, order = to_rows(weight)
    assert fmt.name == "U4_32"
    assert order is not None
    assert order.dtype == np.int32
    values = dequantize(fmt, data.tobytes()).reshape(ROWS, COLS)
    np.testing.assert_array_equal(values, weight.decode()[:, order])


def test_groups_of_unequal_size_stay_in_16_bits() -> None:
    g_idx = (np.arange(COLS) // 32).astype(np.int32)
    g_idx[0] = 1
    weight = grouped(4, 32, g_idx=g_idx)
    found, values = both_decoders(weight)
    assert found == "F16"
    np.testing.assert_allclose(values, weight.decode(), rtol=2**-11)


@pytest.mark.parametrize("block", [64, 128, 256])
def test_codebooks(block: int) -> None:
    for table, unit in (("nf4", 8e-6), ("fp4", 1e-7)):
        weight = codebook(table, block)  # type: ignore[arg-type]
        found, values = both_decoders(weight)
        assert found == f"{table.upper()}_64"
        largest = np.repeat(weight.absmax, block)[: ROWS * COLS].reshape(ROWS, COLS)
        assert (np.abs(values - weight.decode()) <= unit * largest).all()


def test_row_int8() -> None:
    codes = rng.integers(-127, 128, (ROWS, COLS)).astype(np.int8)
    weight = RowInt8(codes, rng.uniform(0.1, 2, ROWS).astype(np.float32))
    found, values = both_decoders(weight)
    assert found == "U8_128"
    assert (np.abs(values - weight.decode()) <= 2e-7 * weight.absmax[:, None]).all()


@pytest.mark.parametrize(
    ("scales", "block", "name"),
    [
        ((1, 1), None, "F8_128"),
        ((ROWS, 1), None, "F8_128"),
        ((3, 3), (8, 128), "F8_128"),
        ((2, 6), (16, 64), "F8_32"),
        ((1, 1), (ROWS, COLS), "F8_128"),
    ],
)
def test_float8_is_exact(scales: tuple[int, int], block: tuple[int, int] | None, name: str) -> None:
    codes = np.resize(np.delete(np.arange(256), (127, 255)), (ROWS, COLS)).astype(np.uint8)
    weight = Float8(codes, rng.uniform(0.001, 0.1, scales).astype(np.float32), block)
    found, values = both_decoders(weight)
    assert found == name
    assert (values == weight.decode()).all()


def test_what_no_kernel_has_is_kept_in_floats() -> None:
    codes = rng.integers(0, 127, (ROWS, COLS)).astype(np.uint8)
    some = Float8(codes, np.full((1, 1), 0.01, np.float32))
    for odd in (
        Float8(np.where(codes == 5, 127, codes).astype(np.uint8), some.scales),  # not a number
        Float8(codes, np.full((2, 16), 0.01, np.float32), (16, 24)),
        Float8(codes & 63, np.full((1, 1), 1e36, np.float32)),
    ):
        assert both_decoders(odd)[0] in ("F16", "F32")
    assert both_decoders(Float8(codes, some.scales))[0] == "F8_128"
    huge = GroupedInt(8, COLS, np.full((ROWS, COLS), 255, np.uint8), np.full((ROWS, 1), 1e4, np.float32), g_idx=None)
    assert both_decoders(huge)[0] == "U8_128"
    small = codebook("nf4", 32)
    assert both_decoders(small)[0] == "F16"
