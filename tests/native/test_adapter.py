"""Adapters in the native decoder: against the reference with merged weights, and bit for bit in any company."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from native.test_executor import Runner, expected, prompt
from native.tiny_models import TinyModel, shapes, tiny
from nybble import _native

pytestmark = pytest.mark.kernels
ISAS = _native.available_isas()
MODELS = ("llama-q4_k", "qwen-mix", "gemma-q8_0", "odd-f32")
Floats = npt.NDArray[np.float32]
Factors = Mapping[str, tuple[Floats, Floats, float]]
MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")


def random_factors(model: TinyModel, seed: int, *, ranks: tuple[int, ...] = (3, 16, 21, 1), skip: int = 0) -> Factors:
    """Factors for the matrices of every layer but each `skip`-th, far larger than the weights themselves."""
    rng = np.random.default_rng(seed)
    found: dict[str, tuple[Floats, Floats, float]] = {}
    for number, (name, shape) in enumerate(shapes(model.spec).items()):
        if not name.endswith(MATRICES):
            continue
        if skip and number % skip == 0:
            continue
        rank = ranks[number % len(ranks)]
        a = rng.standard_normal((rank, shape[1])) / np.sqrt(shape[1])
        b = rng.standard_normal((shape[0], rank)) / np.sqrt(rank)
        found[name] = a.astype(np.float32), b.astype(np.float32), 10 + rng.random()
    assert found
    return found


def adapter(native: _native.Model, factors: Factors, fmt: str = "F16") -> _native.Adapter:
    dtype = np.float16 if fmt == "F16" else np.float32
    layers: dict[int, list[tuple[str, int, npt.NDArray, npt.NDArray, float]]] = {}
    for name, (a, b, factor) in factors.items():
        _, layer, inner = name.split(".", 2)
        layers.setdefault(int(layer), []).append((inner, len(a), a.astype(dtype), b.astype(dtype), factor))
    made = _native.Adapter(native, fmt)
    for layer, all_of_it in layers.items():
        made.set_layer(layer, all_of_it)
    made.finish()
    return made


def merged(model: TinyModel, factors: Factors, dtype: type = np.float32) -> TinyModel:
    weights = dict(model.weights)
    for name, (a, b, factor) in factors.items():
        a, b = (x.astype(dtype).astype(np.float64) for x in (a, b))
        weights[name] = (weights[name] + factor * (b @ a)).astype(np.float32)
    return replace(model, weights=weights)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fmt", ["F32", "F16"])
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_what_merged_weights_are(name, fmt, isa):
    model = tiny(name)
    native = model.native(isa=isa, act="f32", threads=2)
    factors = random_factors(model, 1)
    tokens = prompt(model, 70)
    (actual,) = Runner(native, [tokens], adapters=[adapter(native, factors, fmt)], adapter_of=[0]).run(33)
    want = expected(merged(model, factors, np.float16 if fmt == "F16" else np.float32), tokens)
    np.testing.assert_allclose(actual, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    assert np.abs(want - expected(model, tokens)).max() > 0.01 * np.abs(want).max()  # it does something


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", ["int8", "f32"])
@pytest.mark.parametrize("name", MODELS)
def test_company_changes_nothing(name, act, isa):
    model = tiny(name)
    native = model.native(isa=isa, act=act, threads=1)
    adapters = [adapter(native, random_factors(model, seed, skip=seed)) for seed in (0, 2, 3, 5)]
    prompts = [prompt(model, 3 + 5 * i, seed=i) for i in range(17)]
    adapter_of = [(i * 7) % 5 - 1 for i in range(17)]
    alone = [
        Runner(native, [tokens], adapters=[adapters[which]], adapter_of=[min(which, 0)]).run(512)[0]
        for tokens, which in zip(prompts, adapter_of, strict=True)
    ]
    bare = [i for i in range(17) if adapter_of[i] < 0]
    for i in bare:
        assert np.array_equal(alone[i], Runner(native, [prompts[i]]).run(512)[0])
    for threads in (1, 2):
        again = model.native(isa=isa, act=act, threads=threads)
        adapters = [adapter(again, random_factors(model, seed, skip=seed)) for seed in (0, 2, 3, 5)]
        together = Runner(again, prompts, shuffle_blocks=True, adapters=adapters, adapter_of=adapter_of)
        together.step([(s, 3 + s) for s in range(17)])  # ragged
        for i, beside in enumerate(together.run(5)):
            assert np.array_equal(alone[i], beside), (i, threads)


@pytest.mark.parametrize("isa", ISAS)
def test_neighbours_with_one_adapter_change_nothing(isa):
    """Tiles of every size: the tokens of one adapter side by side, in one sequence and in several."""
    model = tiny("llama-q4_k")
    native = model.native(isa=isa)
    one = [adapter(native, random_factors(model, 2))]
    tokens = prompt(model, 37)
    whole = Runner(native, [tokens], adapters=one, adapter_of=[0]).run(512)[0]
    for chunk in (1, 2, 3, 4, 5, 7, 16):
        assert np.array_equal(whole, Runner(native, [tokens], adapters=one, adapter_of=[0]).run(chunk)[0]), chunk
    for row in Runner(native, [tokens] * 11, adapters=one, adapter_of=[0] * 11).run(6):
        assert np.array_equal(whole, row)


def test_an_adapter_without_factors_changes_nothing():
    model = tiny("qwen-mix")
    native = model.native()
    empty = _native.Adapter(native, "F16")
    empty.finish()
    tokens = prompt(model, 20)
    (actual,) = Runner(native, [tokens], adapters=[empty], adapter_of=[0]).run(512)
    assert empty.nbytes == 0
    assert np.array_equal(actual, Runner(native, [tokens]).run(512)[0])


def factor(rows: int, cols: int, rank: int = 4, name: str = "attn.q") -> tuple[str, int, bytes, bytes, float]:
    return name, rank, bytes(2 * rank * cols), bytes(2 * rows * rank), 1.0


@pytest.mark.parametrize(
    ("layer", "factors", "message"),
    [
        (2, [factor(256, 256)], "the model has no layer 2"),
        (-1, [factor(256, 256)], "the model has no layer -1"),
        (0, [factor(256, 256, name="attn.x")], "attn.x: a layer has no such matrix"),
        (0, [factor(256, 255)], "must have 2048 and 2048 bytes, not 2040 and 2048"),
        (0, [factor(255, 256)], "must have 2048 and 2048 bytes, not 2048 and 2040"),
        (0, [factor(256, 256, rank=0)], "the rank 0 is no rank"),
        (0, [("attn.q", 1 << 30, b"", b"", 1.0)], "is no rank"),
        (0, [(*factor(256, 256)[:4], float("nan"))], "the factor must be finite"),
        (0, [factor(256, 256)] * 2, "attn.q come twice"),
    ],
)
def test_what_does_not_fit_is_refused(layer, factors, message):
    made = _native.Adapter(tiny("llama-q4_k").native(), "F16")
    with pytest.raises(ValueError, match=message):
        made.set_layer(layer, factors)


def test_misuse_is_refused():
    model = tiny("llama-q4_k")
    native = model.native()
    with pytest.raises(ValueError, match="kept in F16 or F32"):
        _native.Adapter(native, "Q8_0")
    made = _native.Adapter(native, "F16")
    made.set_layer(0, [factor(256, 256)])
    with pytest.raises(ValueError, match="set before"):
        made.set_layer(0, [factor(256, 256)])
    tokens = prompt(model, 5)
    with pytest.raises(ValueError, match="not complete"):
        Runner(native, [tokens], adapters=[made], adapter_of=[0]).run(5)
    made.finish()
    with pytest.raises(ValueError, match="complete already"):
        made.set_layer(1, [factor(256, 256)])
    with pytest.raises(ValueError, match="names adapter 1 of 1"):
        Runner(native, [tokens], adapters=[made], adapter_of=[1]).run(5)
    with pytest.raises(ValueError, match="another model"):
        Runner(model.native(), [tokens], adapters=[made], adapter_of=[0]).run(5)
