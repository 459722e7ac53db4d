"""CpuModel loads what a checkpoint holds and says in a sentence what it cannot load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import reference_decoder
from native.tiny_models import TinyModel, tiny
from nybble.backends.cpu import CpuModel, SampleRow, Step
from nybble.checkpoint import Checkpoint, Tensor
from nybble.core.errors import CheckpointError, ConfigError
from nybble.core.tokenizer_source import GgufTokenizer
from nybble.quant.formats import FORMATS

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
    with pytest.raises(ConfigError, match="NYBBLE_ISA must be one of generic, avx2, avx512, not 'avx9'"):
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
