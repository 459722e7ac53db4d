"""Blocks of a native cache as bytes: the same logits in another cache, and wrong arguments are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from native.tiny_models import TinyModel, tiny
from nybble import _native

pytestmark = pytest.mark.kernels
TOKENS = np.random.default_rng(3).integers(0, 90, 40).astype(np.int32)


def i32(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


def run(model: _native.Model, cache: _native.KvCache, table: list[int], begin: int, end: int) -> Any:
    count = end - begin
    return model.execute(cache, TOKENS[begin:end], i32(0, count), i32(begin), i32(*table)[None], i32(*range(count)))


@pytest.mark.parametrize("kv", ["f16", "int8"])
@pytest.mark.parametrize("act", ["int8", "f32"])
def test_blocks_mean_the_same_in_another_cache(kv: str, act: str) -> None:
    model = tiny("llama-q4_k").native(threads=2, kv=kv, act=act)
    first = _native.KvCache(model, 5)
    expected = run(model, first, [4, 1, 0], 0, 40)
    blocks = model.read_blocks(first, i32(4, 1))
    assert blocks.shape == (2, model.cache_bytes_per_block) and blocks.dtype == np.uint8

    other = tiny("llama-q4_k").native(threads=1, kv=kv, act=act)
    cache = _native.KvCache(other, 9)
    other.write_blocks(cache, i32(8, 2), blocks)
    assert (other.read_blocks(cache, i32(8, 2)) == blocks).all()
    assert (run(other, cache, [8, 2, 5], 32, 40) == expected[32:]).all()


BAD = [
    ((i32(5), np.zeros((1, 1), np.uint8)), r"ids\[0\] is 5"),
    ((i32(-1), np.zeros((1, 1), np.uint8)), r"ids\[0\] is -1"),
    ((i32(0), np.zeros((1, 1), np.uint8)), "data must have"),
    ((i32(0, 1), np.zeros((1, 8), np.uint8)), "data must have"),
    ((i32(0), np.zeros((1, 8), np.int32)), "data must be an array of uint8"),
    ((i32(0), np.zeros(8, np.uint8)), "data must have 2 dimensions"),
    ((np.array([0], np.int64), np.zeros((1, 8), np.uint8)), "ids must be an array of int32"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_wrong_arguments_are_refused(arguments: tuple[Any, Any], message: str) -> None:
    model = tiny("llama-q4_k").native()
    cache = _native.KvCache(model, 5)
    with pytest.raises(ValueError, match=message):
        model.write_blocks(cache, *arguments)


def test_wrong_reads_are_refused() -> None:
    model = tiny("llama-q4_k").native()
    with pytest.raises(ValueError, match=r"ids\[1\] is 5"):
        model.read_blocks(_native.KvCache(model, 5), i32(0, 5))
    other = tiny("llama-q4_k").native()
    with pytest.raises(ValueError, match="another model"):
        model.read_blocks(_native.KvCache(other, 5), i32(0))
    with pytest.raises(ValueError, match="another model"):
        model.write_blocks(_native.KvCache(other, 5), i32(0), np.zeros((1, 8), np.uint8))
    assert model.read_blocks(_native.KvCache(model, 5), i32()).shape == (0, model.cache_bytes_per_block)


def changed(model: TinyModel, name: str, at: int) -> TinyModel:
    fmt, shape, data = model.raw[name]
    damaged = bytearray(data)
    damaged[at] ^= 1
    return replace(model, raw={**model.raw, name: (fmt, shape, bytes(damaged))})


def test_a_fingerprint_is_that_of_the_weights() -> None:
    model = tiny("llama-q4_k")
    mark = model.native(threads=1).weights_fingerprint()
    assert len(mark) == 16
    assert model.native(threads=2).weights_fingerprint() == mark
    assert model.native(kv="int8").weights_fingerprint() == mark
    others = {
        changed(model, name, at).native().weights_fingerprint()
        for name in ("embed", "final_norm", "layers.0.attn.q", "layers.1.ffn.down", "layers.1.attn_norm")
        for at in (0, 1, -1)
    }
    assert len(others) == 15 and mark not in others


def test_an_incomplete_model_has_no_fingerprint() -> None:
    whole = tiny("llama-q4_k")
    name = next(iter(whole.raw))
    part = replace(whole, raw={key: value for key, value in whole.raw.items() if key != name})
    with pytest.raises(ValueError, match="missing"):
        part.native()
