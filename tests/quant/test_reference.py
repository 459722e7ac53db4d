"""The reference decoders give, bit for bit, what the `gguf` package gives, on random bytes (NaN and infinity too)."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.quant.formats import FORMATS, by_ggml_type
from nybble.quant.reference import dequantize

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.unit
WITH_KERNEL = [fmt for fmt in FORMATS.values() if fmt.has_kernel]


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_sizes_agree(fmt):
    try:
        ggml_type = gguf.GGMLQuantizationType(fmt.ggml_type)
    except ValueError:
        pytest.skip(f"this version of gguf does not know {fmt.name}")
    assert gguf.GGML_QUANT_SIZES[ggml_type] == (fmt.block_size, fmt.block_bytes)
    assert ggml_type.name == fmt.name
    assert by_ggml_type(fmt.ggml_type) is fmt


@pytest.mark.parametrize("fmt", WITH_KERNEL, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("seed", range(4))
def test_decodes_as_gguf_does(fmt, seed):
    data = np.random.default_rng(seed).integers(0, 256, (512, fmt.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(fmt.ggml_type)).reshape(-1)
    actual = dequantize(fmt, data.tobytes())
    same = (actual.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(actual) & np.isnan(expected))
    zero = (actual == 0) & (expected == 0)  # the sign of a zero carries nothing
    assert (same | zero).all()


def test_refuses_a_cut_block():
    with pytest.raises(ValueError, match="whole Q4_0 blocks"):
        dequantize(FORMATS["Q4_0"], bytes(19))


def test_refuses_what_it_cannot_decode():
    with pytest.raises(ValueError, match="IQ1_S"):
        dequantize(FORMATS["IQ1_S"], bytes(50))
