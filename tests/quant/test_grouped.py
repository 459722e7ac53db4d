"""Grouped integers come back as scale * (code - zero), exactly, through the reference and the native decoder."""

from __future__ import annotations

import numpy as np
import pytest

from nybble import _native
from nybble.quant.formats import FORMATS
from nybble.quant.grouped import pack_bits, pack_grouped
from nybble.quant.reference import dequantize, unpack_bits

pytestmark = pytest.mark.unit


def random_matrix(bits: int, group_size: int, *, rows: int = 19, cols: int = 384, seed: int = 0):
    rng = np.random.default_rng(seed)
    groups = cols // group_size
    codes = rng.integers(0, 1 << bits, (rows, cols)).astype(np.uint8)
    scales = rng.normal(0, 0.02, (rows, groups)).astype(np.float16)
    zeros = rng.integers(0, min(1 << bits, 255) + 1, (rows, groups))
    return codes, scales, zeros


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group_size", "block"), [(32, 32), (64, 32), (96, 32), (128, 128), (384, 128)])
def test_every_value_is_exact(bits: int, group_size: int, block: int) -> None:
    codes, scales, zeros = random_matrix(bits, group_size)
    fmt, data = pack_grouped(codes, scales, zeros, bits=bits)
    assert fmt is FORMATS[f"U{bits}_{block}"]
    assert data.shape == (19, fmt.row_bytes(384))
    repeated = [np.repeat(x, group_size, axis=1) for x in (scales.astype(np.float64), zeros)]
    expected = (repeated[0] * (codes.astype(np.float64) - repeated[1])).astype(np.float32)
    assert (dequantize(fmt, data.tobytes()).reshape(19, 384) == expected).all()
    assert (_native.pack_roundtrip(fmt.name, data.tobytes(), 19, 384) == expected).all()


def test_eight_bits_keep_a_float32_scale() -> None:
    codes, _, zeros = random_matrix(8, 384)
    scales = np.random.default_rng(1).normal(0, 1e-6, (19, 1)).astype(np.float32)
    fmt, data = pack_grouped(codes, scales, zeros, bits=8)
    expected = (scales.astype(np.float64) * (codes.astype(np.float64) - zeros)).astype(np.float32)
    assert np.allclose(dequantize(fmt, data.tobytes()).reshape(19, 384), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bits_round_trip(bits: int) -> None:
    codes = np.random.default_rng(2).integers(0, 1 << bits, (5, 64)).astype(np.uint8)
    assert (unpack_bits(pack_bits(codes, bits), bits) == codes).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "2, 3, 4 or 8 bits"),
        ({"bits": 3}, "does not fit 3 bits"),
        ({"scales": np.ones((19, 5), np.float16)}, "do not go with"),
        ({"scales": np.full((19, 3), 1e9), "zeros": np.zeros((19, 3), int)}, "range of float16"),
        ({"scales": np.full((19, 3), 1e-12), "zeros": np.zeros((19, 3), int)}, "range of float16"),
        ({"zeros": np.full((19, 3), 17)}, "between 0 and 16"),
        ({"zeros": np.full((19, 3), -1)}, "between 0 and 16"),
    ],
)
def test_refuses(change: dict, message: str) -> None:
    codes, scales, zeros = random_matrix(4, 128)
    arguments = {"scales": scales, "zeros": zeros, "bits": 4} | change
    with pytest.raises(ValueError, match=message):
        pack_grouped(codes, arguments.pop("scales"), arguments.pop("zeros"), **arguments)


def test_refuses_groups_that_cut_a_block() -> None:
    codes = np.zeros((2, 96), np.uint8)
    with pytest.raises(ValueError, match="multiples of 32"):
        pack_grouped(codes, np.ones((2, 2)), np.zeros((2, 2), int), bits=4)
