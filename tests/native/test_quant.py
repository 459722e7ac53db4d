"""The native decoders, of file blocks and of packed matrices, give the bits of the reference decoders."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from nybble import _native
from nybble.quant.formats import FORMATS, QuantFormat
from nybble.quant.reference import dequantize

pytestmark = pytest.mark.kernels
WITH_KERNEL = [fmt for fmt in FORMATS.values() if fmt.has_kernel]
each_format = pytest.mark.parametrize("fmt", WITH_KERNEL, ids=lambda fmt: fmt.name)


def random_bytes(fmt: QuantFormat, weights: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(fmt.row_bytes(weights))


def assert_same_bits(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    assert ((actual.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(actual) & np.isnan(expected))).all()


@each_format
@pytest.mark.parametrize("weights", [0, 256, 256 * 300])
def test_decodes_file_blocks(fmt: QuantFormat, weights: int) -> None:
    data = random_bytes(fmt, weights, seed=weights)
    assert_same_bits(_native.dequantize(fmt.name, data), dequantize(fmt, data))


@each_format
def test_decodes_at_an_odd_address(fmt: QuantFormat) -> None:
    data = random_bytes(fmt, 1024, seed=1)
    shifted = memoryview(b"\0" + data)[1:]
    assert_same_bits(_native.dequantize(fmt.name, shifted), dequantize(fmt, data))
    packed = _native.pack_roundtrip(fmt.name, shifted, 2, 512)
    assert_same_bits(packed, dequantize(fmt, data).reshape(2, 512))


@each_format
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (16, 512), (17, 256), (131, 1280)])
def test_a_packed_matrix_decodes_to_the_same_floats(fmt: QuantFormat, rows: int, cols: int) -> None:
    data = random_bytes(fmt, rows * cols, seed=rows)
    expected = dequantize(fmt, data).reshape(rows, cols)
    assert_same_bits(_native.pack_roundtrip(fmt.name, data, rows, cols), expected)


@pytest.mark.parametrize("fmt", [f for f in WITH_KERNEL if f.block_size == 32], ids=lambda fmt: fmt.name)
def test_rows_may_be_any_number_of_blocks(fmt: QuantFormat) -> None:
    data = random_bytes(fmt, 18 * 96, seed=3)
    assert_same_bits(_native.pack_roundtrip(fmt.name, data, 18, 96), dequantize(fmt, data).reshape(18, 96))


def test_every_exponent_of_mxfp4() -> None:
    blocks = np.empty((256, 17), np.uint8)
    blocks[:, 0] = np.arange(256)
    blocks[:, 1:] = np.arange(16) * 17
    expected = dequantize(FORMATS["MXFP4"], blocks.tobytes())
    assert_same_bits(_native.dequantize("MXFP4", blocks.tobytes()), expected)
    assert_same_bits(_native.pack_roundtrip("MXFP4", blocks.tobytes(), 256, 32), expected.reshape(256, 32))


def test_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="unknown weight format 'Q9_K'"):
        _native.dequantize("Q9_K", bytes(18))


def test_refuses_a_cut_block() -> None:
    with pytest.raises(ValueError, match="whole blocks of Q4_0"):
        _native.dequantize("Q4_0", bytes(19))
