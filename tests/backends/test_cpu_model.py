"""CpuModel loads what a checkpoint holds and says in a sentence what it cannot load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import reference_decoder
from native.tiny_models import LLAMA, TinyModel, build, tiny
from nybble.backends.cpu import BadLogitsError, CpuModel, Sampled, SampleRow, Step
from nybble.checkpoint import Checkpoint, Tensor
from nybble.core.errors import CheckpointError, ConfigError
from nybble.core.tokenizer_source import GgufTokenizer
from nybble.quant.formats import FORMATS
from nybble.quant.weights import GroupedInt

pytestmark = pytest.mark.unit


class RecordingCheckpoint(Checkpoint):
    released: list[str]

    def release(self, tensor: Tensor) -> None:
        self.__dict__.setdefault("released", []).append(tensor.name)


def checkpoint(model: TinyModel, **changes: object) -> RecordingCheckpoint:
    tensors = {
        name: Tensor(name, shape, FORMATS[fmt], memoryview(data)) for name, (fmt, shape, data) in model.raw.items()
    }
    fields = {
        "path": Path("tiny.gguf"), "container": "gguf", "spec": model.spec, "tensors": tensors,
        "tokenizer": GgufTokenizer({}), "chat_template": None, "eos_token_ids": (), "bos_token_id": None,
        "add_bos": False, "metadata": {}, "file_bytes": 0,
    }  # fmt: skip
    return RecordingCheckpoint(**(fields | changes))


def prefill(tokens: list[int]) -> Step:
    blocks = -(-len(tokens) // 16)
    return Step(
        token_ids=np.array(tokens, np.int32),
        cu_seqlens_q=np.array([0, len(tokens)], np.int32),
        context_lens=np.zeros(1, np.int32),
        block_tables=np.arange(blocks, dtype=np.int32)[None],
        logit_rows=np.arange(len(tokens), dtype=np.int32),
    )


@pytest.mark.parametrize("name", ["llama-q4_k", "qwen-mix", "gemma-q8_0", "odd-f32"])
def test_loads_and_runs(name, monkeypatch):
    monkeypatch.setenv("NYBBLE_ACT", "f32")
    tiny_model = tiny(name)
    source = checkpoint(tiny_model)
    model = CpuModel.load(source, threads=2, context=64)
    assert source.released == list(source.tensors)
    weights = model.memory_bytes
    model.new_cache(4)
    assert model.memory_bytes > weights
    tokens = list(range(30))
    logits = model.execute(prefill(tokens))
    want = reference_decoder.logits(tiny_model.spec, tiny_model.weights, tiny_model.ropes, tokens)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    drawn = model.sample(logits, [SampleRow(temperature=0.0, logprobs=2)] * 30)
    assert [one.token_id for one in drawn] == logits.argmax(1).tolist()
    assert all(one.top_logprobs[0] == (one.token_id, one.logprob) for one in drawn)


def test_isa_and_threads_are_as_asked(monkeypatch):
    monkeypatch.setenv("NYBBLE_ISA", "generic")
    model = CpuModel.load(checkpoint(tiny("qwen-q8_0")), threads=3, context=64)
    assert (model.isa, model.threads) == ("generic", 3)
    monkeypatch.setenv("NYBBLE_ISA", "avx9")
    with pytest.raises(ConfigError, match="NYBBLE_ISA must be one of generic, avx2, avx512, amx, not 'avx9'"):
        CpuModel.load(checkpoint(tiny("qwen-q8_0")), context=64)
    monkeypatch.delenv("NYBBLE_ISA")
    with pytest.raises(ConfigError, match="number of threads must be between"):
        CpuModel.load(checkpoint(tiny("qwen-q8_0")), threads=0, context=64)


def test_norms_that_are_stored_minus_one():
    model = tiny("llama-f32")
    shifted = checkpoint(model)
    tensors = dict(shifted.tensors)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 1:
            data = memoryview((np.frombuffer(tensor.data, np.float32) - 1).astype(np.float32).tobytes())
            tensors[name] = replace(tensor, data=data, plus_one=True)
    results = []
    for source in (shifted, checkpoint(model, tensors=tensors)):
        loaded = CpuModel.load(source, context=64)
        loaded.new_cache(1)
        results.append(loaded.execute(prefill([1, 2, 3])))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-3, atol=0.02)


def test_says_what_is_wrong_with_a_checkpoint():
    model = tiny("llama-q4_k")
    tensors = checkpoint(model).tensors
    without = {name: tensor for name, tensor in tensors.items() if name != "layers.1.ffn.up"}
    with pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be run: 1 tensors are missing: layers\.1\.ffn\.up"):
        CpuModel.load(checkpoint(model, tensors=without), context=64)
    strange = tensors | {"embed": replace(tensors["embed"], format=FORMATS["IQ1_S"])}
    with pytest.raises(CheckpointError, match="embed is encoded as IQ1_S"):
        CpuModel.load(checkpoint(model, tensors=strange), context=64)
    extra = tensors | {"layers.9.ffn.up": tensors["layers.1.ffn.up"]}
    with pytest.raises(CheckpointError, match=r"no tensor layers\.9\.ffn\.up"):
        CpuModel.load(checkpoint(model, tensors=extra), context=64)


def test_needs_a_cache():
    model = CpuModel.load(checkpoint(tiny("qwen-q8_0")), context=64)
    with pytest.raises(ValueError, match="new_cache"):
        model.execute(prefill([1]))
    with pytest.raises(ValueError, match="new_cache"):
        model.copy_blocks([(0, 1)])


@pytest.mark.parametrize("act", ["int8", "f32"])
@pytest.mark.parametrize("name", ["llama-k-mix", "gemma-q8_0", "odd-f32"])
def test_hidden_states_lead_to_the_same_logits(name, act, monkeypatch):
    monkeypatch.setenv("NYBBLE_ACT", act)
    spec = tiny(name).spec
    model = CpuModel.load(checkpoint(tiny(name)), threads=2, context=128)
    model.new_cache(6)
    tokens = [i * 7 % spec.vocab_size for i in range(90)]
    plain = prefill(tokens)
    logits = model.execute(plain)
    with pytest.raises(ValueError, match="hidden_rows"):
        model.hidden()
    rows = np.array([5, 89, 5, *range(80)], np.int32)
    few = replace(plain, logit_rows=np.array([89], np.int32), hidden_rows=rows)
    assert np.array_equal(model.execute(few)[0], logits[89])
    hidden = model.hidden()
    assert hidden.shape == (len(rows), spec.hidden_size)
    assert np.array_equal(hidden[0], hidden[2])
    targets = np.array([tokens[(row + 1) % 90] for row in rows], np.int32)
    assert model.score_hidden(hidden, targets, 3) == model.score(logits[rows], targets, 3)
    none = replace(plain, logit_rows=np.zeros(0, np.int32), hidden_rows=rows[:1])
    assert model.execute(none).shape == (0, spec.vocab_size)
    assert np.array_equal(model.hidden(), hidden[:1])
    weight = tiny(name).weights["embed" if spec.tied_head else "head"]
    want = hidden[1] @ weight.T * spec.logit_scale
    if not spec.logit_softcap and act == "f32":
        np.testing.assert_allclose(logits[89], want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("act", ["int8", "f32"])
@pytest.mark.parametrize("name", ["qwen-mix", "gemma-f16"])
def test_copied_blocks_hold_the_same_keys_and_values(name, act, monkeypatch):
    monkeypatch.setenv("NYBBLE_ACT", act)
    model = CpuModel.load(checkpoint(tiny(name)), threads=2, context=64)
    weights = model.memory_bytes
    model.new_cache(9)
    assert model.memory_bytes - weights == 9 * model.cache_bytes_per_block
    tokens = list(range(40))
    whole = model.execute(prefill(tokens))
    model.copy_blocks([])
    model.copy_blocks([(0, 8), (8, 6), (1, 4), (5, 5)])

    def go_on(table: list[int], context: int, token_id: int) -> Step:
        return Step(
            token_ids=np.array([token_id], np.int32),
            cu_seqlens_q=np.array([0, 1], np.int32),
            context_lens=np.array([context], np.int32),
            block_tables=np.array([table], np.int32),
            logit_rows=np.zeros(1, np.int32),
        )

    assert np.array_equal(model.execute(go_on([8, 4], 31, tokens[31]))[0], whole[31])
    other = model.execute(go_on([6, 4], 31, tokens[0]))[0]  # writes into the copy
    assert not np.array_equal(other, whole[31])
    assert np.array_equal(model.execute(go_on([0, 1, 2], 39, tokens[39]))[0], whole[39])
    with pytest.raises(ValueError, match=r"pairs\[1\] is 9"):
        model.copy_blocks([(0, 9)])
    with pytest.raises(ValueError, match="block ids must fit int32"):
        model.copy_blocks([(0, 2**40)])


@pytest.fixture(scope="module")
def small() -> CpuModel:
    return CpuModel.load(checkpoint(tiny("llama-f32")), threads=2, context=64)  # 101 tokens


def test_every_field_of_a_row_reaches_the_sampler(small):
    logits = np.zeros((1, 101), np.float32)
    logits[0, [10, 20, 30]] = 9, 8, 7
    only_77 = np.zeros(4, np.uint32)
    only_77[77 // 32] = 1 << 77 % 32
    ten, ten_twenty = np.array([10], np.int32), np.array([10, 20, 20, 10, 10], np.int32)

    def greedy(**fields: object) -> int:
        return small.sample(logits, [SampleRow(temperature=0.0, **fields)])[0].token_id

    assert greedy() == 10
    assert greedy(allowed_mask=only_77) == 77
    assert greedy(banned_ids=(10,)) == 20
    assert greedy(logit_bias=((30, 3.0), (20, 1.5))) == 30
    assert greedy(repetition_penalty=2.0, prompt_ids=ten) == 20
    assert greedy(repetition_penalty=2.0, output_ids=ten_twenty) == 30
    assert greedy(presence_penalty=1.5, output_ids=ten) == 20
    assert greedy(presence_penalty=1.5, prompt_ids=ten) == 10
    assert greedy(frequency_penalty=0.9, output_ids=ten_twenty) == 30
    assert greedy(frequency_penalty=0.9, prompt_ids=ten_twenty) == 10
    for fields in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 0.9}):
        rows = [SampleRow(temperature=5.0, seed=seed, logprobs=None, **fields) for seed in range(50)]
        assert {one.token_id for one in small.sample(np.repeat(logits, 50, axis=0), rows)} == {10}
    assert not SampleRow(prompt_ids=ten, output_ids=ten).has_edits


def test_ranks_are_given_with_log_probabilities(small):
    logits = np.arange(101, dtype=np.float32)[None]
    assert small.sample(logits, [SampleRow(temperature=0.0, banned_ids=(100, 99))])[0].rank == 3
    assert small.sample(logits, [SampleRow(logprobs=None)])[0].rank is None
    scored = small.score(logits, [97], 1)[0]
    assert (scored.rank, scored.top_logprobs[0][0]) == (4, 100)
    assert small.score(logits, [100])[0] == (scored.top_logprobs[0][1], 1, ())


def test_bad_rows_are_named_and_the_others_can_go_on(small):
    logits = np.zeros((3, 101), np.float32)
    logits[1, 5] = np.nan
    nothing = np.zeros(4, np.uint32)
    rows = [SampleRow(allowed_mask=nothing), SampleRow(), SampleRow(temperature=0.0)]
    with pytest.raises(BadLogitsError, match=r"logit row 0, 1: it holds NaN or infinity, or every") as caught:
        small.sample(logits, rows)
    assert caught.value.rows == (0, 1)
    assert isinstance(small.sample(logits[2:], rows[2:])[0], Sampled)
    with pytest.raises(BadLogitsError, match="logit row 1"):
        small.score(logits, [0, 0, 0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 2**40}, "top_k must fit int32"),
        ({"seed": -1}, "seed must fit uint64"),
        ({"banned_ids": (2**31,)}, "banned_ids must fit int32"),
        ({"banned_ids": (101,)}, r"banned_ids\[0\] is 101"),
        ({"logit_bias": ((101, 1.0),)}, r"bias_ids\[0\] is 101"),
        ({"logit_bias": ((1, float("nan")),)}, "bias must be finite"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and above 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be finite"),
        ({"frequency_penalty": 1.0, "output_ids": np.array([-1], np.int32)}, r"output_ids\[0\] is -1"),
        ({"allowed_mask": np.zeros(3, np.uint32)}, "allowed must have 4 words, not 3"),
        ({"temperature": float("nan")}, "temperature must be finite"),
        ({"top_p": 0.0}, "top_p must be above 0"),
    ],
)
def test_refuses_rows_that_do_not_fit(small, fields, message):
    with pytest.raises(ValueError, match=message):
        small.sample(np.zeros((1, 101), np.float32), [SampleRow(**fields)])


def test_refuses_targets_that_would_be_cut_to_fit(small):
    with pytest.raises(ValueError, match="target_ids must be an array of int32, not int64"):
        small.score(np.zeros((1, 101), np.float32), np.array([2**32]))


def act_order_checkpoint(model: TinyModel, other: str) -> RecordingCheckpoint:
    """The matrices of layer 0 in 4 bits with scattered groups: one order for each input, but another for `other`."""
    rng = np.random.default_rng(8)
    of_width: dict[int, np.ndarray] = {}
    source = checkpoint(model)
    tensors = dict(source.tensors)
    for name, tensor in source.tensors.items():
        if len(tensor.shape) == 1 or not name.startswith("layers.0."):
            continue
        rows, cols = tensor.shape
        fresh = rng.permutation(np.arange(cols, dtype=np.int32) // 32)
        g_idx = fresh if name.endswith(other) else of_width.setdefault(cols, fresh)
        codes = rng.integers(0, 16, (rows, cols)).astype(np.uint8)
        scales = (rng.uniform(0.1, 0.3, (rows, cols // 32)) / np.sqrt(cols)).astype(np.float16)
        weight = GroupedInt(4, 32, codes, scales, g_idx=g_idx)
        tensors[name] = replace(tensor, packed=lambda weight=weight: weight)
    return replace(source, tensors=tensors)


@pytest.mark.parametrize(("act", "error"), [("int8", 0.03), ("f32", 2e-3)])
@pytest.mark.parametrize("other", ["attn.k", "none"])
def test_scattered_groups_are_served_in_four_bits(other, act, error, monkeypatch):
    """But a matrix that wants its inputs in another order than its neighbours has 16 bits, and with floats all have."""
    monkeypatch.setenv("NYBBLE_ACT", act)
    source = act_order_checkpoint(build(LLAMA, ("F32",)), other)
    model = CpuModel.load(source, threads=2, context=64)
    weights = model.memory_bytes
    model.new_cache(4)
    tokens = list(range(30))
    logits = model.execute(prefill(tokens))
    decoded = {name: tensor.to_float32() for name, tensor in source.tensors.items()}
    want = reference_decoder.logits(LLAMA, decoded, tiny("llama-f32").ropes, tokens)
    assert np.sqrt(np.square(logits - want).mean() / np.square(want).mean()) < error

    def stored(name: str, weight: np.ndarray) -> int:
        if weight.ndim == 1 or not name.startswith("layers.0."):
            return 4 * weight.size
        return weight.size * 2 if act == "f32" or name.endswith(other) else weight.size * 20 // 32

    whole = sum(stored(name, weight) for name, weight in decoded.items())
    orders = 0 if act == "f32" else 4 * (3 * LLAMA.hidden_size + LLAMA.layers[0].ffn_size)
    padding = 16 * 2 * 4 * LLAMA.hidden_size  # groups of rows that are not full
    assert whole + orders <= weights <= whole + orders + padding
