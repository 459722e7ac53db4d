"""The reference decoders give, bit for bit, what the `gguf` package gives, on random bytes (NaN and infinity too)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.quant.formats import FORMATS, by_ggml_type
from nybble.quant.reference import dequantize

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.unit
IN_GGUF = [fmt for fmt in FORMATS.values() if fmt.ggml_type is not None]
WITH_KERNEL = [fmt for fmt in IN_GGUF if fmt.has_kernel]


@pytest.mark.parametrize("fmt", IN_GGUF, ids=lambda fmt: fmt.name)
def test_sizes_agree(fmt):
    try:
        ggml_type = gguf.GGMLQuantizationType(fmt.ggml_type)
    except ValueError:
        pytest.skip(f"this version of gguf does not know {fmt.name}")
    assert gguf.GGML_QUANT_SIZES[ggml_type] == (fmt.block_size, fmt.block_bytes)
    assert ggml_type.name == fmt.name
    assert by_ggml_type(fmt.ggml_type) is fmt


def assert_decodes_as_gguf_does(fmt, data: bytes) -> None:
    blocks = np.frombuffer(data, np.uint8).reshape(-1, fmt.block_bytes)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(fmt.ggml_type)).reshape(-1)
    actual = dequantize(fmt, data)
    assert actual.dtype == np.float32
    # Bits, so that the sign of a zero counts; of NaN only that it is one.
    assert ((actual.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(actual) & np.isnan(expected))).all()


@pytest.mark.parametrize("fmt", WITH_KERNEL, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("seed", range(4))
def test_decodes_random_bytes_as_gguf_does(fmt, seed):
    assert_decodes_as_gguf_does(fmt, np.random.default_rng(seed).bytes(512 * fmt.block_bytes))


@pytest.mark.parametrize("fmt", WITH_KERNEL, ids=lambda fmt: fmt.name)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_decodes_contrived_blocks_as_gguf_does(fmt, data):
    assert_decodes_as_gguf_does(fmt, data.draw(st.binary(min_size=fmt.block_bytes, max_size=fmt.block_bytes)))


def test_decodes_every_exponent_of_mxfp4():
    blocks = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 17))
    blocks[:, 1:] = np.arange(16) * 17
    assert_decodes_as_gguf_does(FORMATS["MXFP4"], blocks.tobytes())


@pytest.mark.parametrize("fmt", WITH_KERNEL, ids=lambda fmt: fmt.name)
def test_decodes_nothing(fmt):
    assert dequantize(fmt, b"").shape == (0,)


def test_refuses_a_cut_block():
    with pytest.raises(ValueError, match="whole Q4_0 blocks"):
        dequantize(FORMATS["Q4_0"], bytes(19))


def test_refuses_what_it_cannot_decode():
    with pytest.raises(ValueError, match="IQ1_S"):
        dequantize(FORMATS["IQ1_S"], bytes(50))
