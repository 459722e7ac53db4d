"""The native decoder: against the reference decoder, and bit for bit against itself however a step is cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

import reference_decoder
from native.tiny_models import MODELS, TinyModel, tiny
from nybble import _native

pytestmark = pytest.mark.kernels
ISAS = _native.available_isas()
Logits = npt.NDArray[np.float32]


class Runner:
    """Feeds sequences to a native model in steps of any shape and collects the logits of every token."""

    def __init__(
        self,
        model: _native.Model,
        tokens: list[list[int]],
        *,
        shuffle_blocks: bool = False,
        adapters: Sequence[_native.Adapter] = (),
        adapter_of: Sequence[int] | None = None,
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.adapter_of = adapter_of
        self.tokens = tokens
        self.done = [0] * len(tokens)
        self.logits: list[list[Logits]] = [[] for _ in tokens]
        self.width = max(-(-len(t) // 16) for t in tokens)
        num_blocks = self.width * len(tokens) + 3
        ids = np.arange(num_blocks)
        if shuffle_blocks:
            np.random.default_rng(5).shuffle(ids)
        self.tables = ids[: self.width * len(tokens)].reshape(len(tokens), self.width).astype(np.int32)
        self.cache = _native.KvCache(model, num_blocks)

    def step(self, takes: list[tuple[int, int]]) -> None:
        """Each pair is a sequence and how many of its tokens go into the step."""
        ids: list[int] = []
        cu = [0]
        for s, count in takes:
            ids += self.tokens[s][self.done[s] : self.done[s] + count]
            cu.append(len(ids))
        which = [s for s, _ in takes]
        out = self.model.execute(
            self.cache,
            np.array(ids, np.int32),
            np.array(cu, np.int32),
            np.array([self.done[s] for s in which], np.int32),
            self.tables[which],
            np.arange(len(ids), dtype=np.int32),
            adapters=self.adapters,
            adapter_of=None if self.adapter_of is None else np.array([self.adapter_of[s] for s in which], np.int32),
        )
        for row, (s, count) in enumerate(takes):
            self.logits[s].append(out[cu[row] : cu[row + 1]])
            self.done[s] += count

    def run(self, chunk: int) -> list[Logits]:
        """All sequences side by side, `chunk` tokens of each in a step."""
        while any(left := [len(t) - d for t, d in zip(self.tokens, self.done, strict=True)]):
            self.step([(s, min(chunk, n)) for s, n in enumerate(left) if n > 0])
        return [np.concatenate(rows) for rows in self.logits]


def prompt(model: TinyModel, length: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.spec.vocab_size, length).tolist()


def expected(model: TinyModel, tokens: list[int]) -> Logits:
    return reference_decoder.logits(model.spec, model.weights, model.ropes, tokens)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", MODELS)
def test_float_activations_match_the_reference(name, isa):
    model = tiny(name)
    tokens = prompt(model, 290)  # longer than a chunk of the attention
    (actual,) = Runner(model.native(isa=isa, act="f32"), [tokens]).run(512)
    want = expected(model, tokens)
    np.testing.assert_allclose(actual, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", MODELS)
def test_int8_activations_come_near_the_reference(name, isa):
    model = tiny(name)
    tokens = prompt(model, 290)
    (actual,) = Runner(model.native(isa=isa), [tokens]).run(512)
    want = expected(model, tokens)
    error = np.sqrt(((actual - want) ** 2).mean() / (want**2).mean())
    assert error < 0.04


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", ["int8", "f32"])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_a_prefill_change_nothing(name, act, isa):
    model = tiny(name)
    native = model.native(isa=isa, act=act)
    tokens = prompt(model, 290)
    whole = Runner(native, [tokens]).run(512)[0]
    for chunk in (1, 7, 16, 100):
        assert np.array_equal(whole, Runner(native, [tokens]).run(chunk)[0]), chunk


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["llama-q4_k", "gemma-q8_0", "odd-f32"])
def test_keys_and_values_in_8_bits(name, isa):
    model = tiny(name)
    native = model.native(isa=isa, act="f32", kv="int8")
    tokens = prompt(model, 290)
    whole = Runner(native, [tokens]).run(512)[0]
    for chunk in (1, 7, 100):
        assert np.array_equal(whole, Runner(native, [tokens]).run(chunk)[0]), chunk
    prompts = [prompt(model, 3 + 17 * i, seed=i) for i in range(9)]
    for alone, beside in zip(prompts, Runner(native, prompts, shuffle_blocks=True).run(5), strict=True):
        assert np.array_equal(Runner(native, [alone]).run(512)[0], beside)
    want = expected(model, tokens)
    error = np.sqrt(((whole - want) ** 2).mean() / (want**2).mean())
    assert 0 < error < 0.02
    halves = model.native(isa=isa)
    assert halves.cache_bytes_per_block > 1.6 * native.cache_bytes_per_block  # heads here are as narrow as 16


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_changes_nothing(name, isa):
    model = tiny(name)
    native = model.native(isa=isa)
    prompts = [prompt(model, 3 + 17 * i, seed=i) for i in range(17)]
    together = Runner(native, prompts, shuffle_blocks=True)
    together.step([(s, 3 + s) for s in range(17)])  # ragged
    for alone, beside in zip(prompts, together.run(5), strict=True):
        assert np.array_equal(Runner(native, [alone]).run(512)[0], beside)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("act", ["int8", "f32"])
@pytest.mark.parametrize("name", MODELS)
def test_threads_change_nothing(name, act, isa):
    model = tiny(name)
    prompts = [prompt(model, n, seed=n) for n in (1, 40, 130)]
    one = Runner(model.native(threads=1, isa=isa, act=act), prompts).run(64)
    for threads in (2, 5):  # five is more than the cores of a small machine
        more = Runner(model.native(threads=threads, isa=isa, act=act), prompts).run(64)
        assert all(np.array_equal(a, b) for a, b in zip(one, more, strict=True)), threads


@pytest.mark.parametrize("name", ["llama-q4_k", "gemma-q8_0"])
def test_block_tables_change_nothing(name):
    model = tiny(name)
    native = model.native(threads=2)
    prompts = [prompt(model, n, seed=n) for n in (50, 280)]
    straight = Runner(native, prompts).run(33)
    shuffled = Runner(native, prompts, shuffle_blocks=True).run(33)
    assert all(np.array_equal(a, b) for a, b in zip(straight, shuffled, strict=True))


def test_a_shared_prefix_is_read_by_both():
    model = tiny("llama-q4_k")
    native = model.native(threads=2)
    common = prompt(model, 32)
    prompts = [common + prompt(model, 9, seed=2), common + prompt(model, 21, seed=3)]
    apart = Runner(native, prompts).run(512)
    shared = Runner(native, prompts)
    shared.tables[1, :2] = shared.tables[0, :2]
    shared.step([(0, 32)])
    shared.done[1] = 32
    shared.step([(0, 9), (1, 21)])
    assert np.array_equal(apart[0][32:], shared.logits[0][1])
    assert np.array_equal(apart[1][32:], shared.logits[1][0])


def test_only_the_wanted_rows_of_logits():
    model = tiny("gemma-q8_0")
    native = model.native(threads=2)
    tokens = prompt(model, 40)
    whole = Runner(native, [tokens]).run(512)[0]
    cache = _native.KvCache(native, 3)
    rows = np.array([39, 3, 3], np.int32)
    ids, table = np.array(tokens, np.int32), np.array([[2, 0, 1]], np.int32)
    some = native.execute(cache, ids, np.array([0, 40], np.int32), np.zeros(1, np.int32), table, rows)
    assert np.array_equal(some, whole[rows])
    none = native.execute(cache, ids, np.array([0, 40], np.int32), np.zeros(1, np.int32), table, np.zeros(0, np.int32))
    assert none.shape == (0, model.spec.vocab_size)


def test_a_row_may_be_asked_for_more_often_than_there_are_tokens():
    model = tiny("llama-k-mix")
    native = model.native(threads=2)
    args = (np.array([5], np.int32), np.array([0, 1], np.int32), np.zeros(1, np.int32), np.zeros((1, 1), np.int32))
    out = native.execute(_native.KvCache(native, 1), *args, np.zeros(700, np.int32))
    assert (out == out[0]).all()
