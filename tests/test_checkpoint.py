"""Opening whole models: what a checkpoint says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats import raw
from nybble.checkpoint import Checkpoint, open_checkpoint
from nybble.core.errors import CheckpointError, ModelNotFoundError
from nybble.core.tokenizer_source import GgufTokenizer, TokenizerFile
from tiny_files import FFN, FUSED, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, SHAPES, gguf_model, hf_folder

pytestmark = pytest.mark.unit


def open_bytes(tmp_path: Path, data: bytes) -> Checkpoint:
    return open_checkpoint(raw.save(tmp_path / "m.gguf", data))


def test_gguf(tmp_path: Path) -> None:
    extra = {
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "hello", "general.name": "x",
    }  # fmt: skip
    data = gguf_model(extra=extra)
    checkpoint = open_bytes(tmp_path, data)
    layer = checkpoint.spec.layers[0]
    assert (checkpoint.container, checkpoint.file_bytes, checkpoint.chat_template) == ("gguf", len(data), "hello")
    assert (checkpoint.eos_token_ids, checkpoint.bos_token_id, checkpoint.add_bos) == ((2, 5), 1, True)
    assert (layer.num_q_heads, layer.num_kv_heads, layer.head_dim, layer.ffn_size) == (HEADS, KV_HEADS, HEAD_DIM, FFN)
    assert layer.rope.interleaved
    assert checkpoint.spec.tied_head
    assert isinstance(checkpoint.tokenizer, GgufTokenizer)
    assert set(checkpoint.tokenizer.metadata) == {key for key in extra if key.startswith("tokenizer.")}
    assert checkpoint.metadata["general.name"] == "x"
    wanted = list(SHAPES)
    assert np.all(checkpoint.tensors["layers.0.attn.o"].to_float32() == wanted.index("blk.0.attn_output.weight"))
    assert checkpoint.tensors["layers.0.ffn.down"].shape == (HIDDEN, FFN)


def test_folder(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "chat_template": [{"name": "default", "template": "T"}]})
    )
    checkpoint = open_checkpoint(str(folder))
    assert (checkpoint.container, checkpoint.chat_template, checkpoint.add_bos) == ("safetensors", "T", True)
    assert (checkpoint.eos_token_ids, checkpoint.bos_token_id) == ((3, 4), 1)
    assert isinstance(checkpoint.tokenizer, TokenizerFile)
    assert checkpoint.tokenizer.path == folder / "tokenizer.json"
    assert not checkpoint.spec.layers[0].rope.interleaved
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    (folder / "chat_template.jinja").write_text("J")
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.eos_token_ids, checkpoint.chat_template) == ((7,), "J")


def test_release_and_close(tmp_path: Path) -> None:
    checkpoint = open_bytes(tmp_path, gguf_model())
    before = {name: tensor.to_float32() for name, tensor in checkpoint.tensors.items()}
    for name, tensor in checkpoint.tensors.items():
        checkpoint.release(tensor)
        np.testing.assert_array_equal(tensor.to_float32(), before[name])
    checkpoint.close()
    with pytest.raises(ValueError, match="released"):
        checkpoint.tensors["embed"].to_float32()


def test_fused_tensors_are_cut_by_rows(tmp_path: Path) -> None:
    parts = ("attn_q.", "attn_k.", "attn_v.", "ffn_gate.")
    shapes = {name: shape for name, shape in SHAPES.items() if not any(part in name for part in parts)}
    tensors = open_bytes(tmp_path, gguf_model(shapes=shapes | FUSED, arch="phi3")).tensors
    assert [tensors[f"layers.0.attn.{n}"].shape[0] for n in "qkv"] == [16, 8, 8]
    starts = [tensors[f"layers.0.attn.{n}"].begin for n in "qkv"]
    assert np.diff(starts).tolist() == [16 * HIDDEN * 4, 8 * HIDDEN * 4]
    too_many = shapes | FUSED | {"blk.0.attn_qkv.weight": (40, HIDDEN)}
    with pytest.raises(CheckpointError, match="40 rows instead of 32"):
        open_bytes(tmp_path, gguf_model(shapes=too_many, arch="phi3"))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        open_checkpoint(tmp_path / "no.gguf")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("missing", SHAPES)
def test_a_missing_tensor_is_named(tmp_path: Path, missing: str) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != missing}
    with pytest.raises(CheckpointError, match=missing):
        open_bytes(tmp_path, gguf_model(shapes=shapes))


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "token_embd.weight"])
def test_a_wrong_shape_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        open_bytes(tmp_path, gguf_model(shapes=SHAPES | {name: (*SHAPES[name][::-1], 1)}))


def test_an_encoding_without_a_kernel_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="I32"):
        open_bytes(tmp_path, gguf_model(kind=26))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"block_count": 0}, "block_count is 0"),
        ({"block_count": 1 << 31}, "block_count"),
        ({"block_count": "1"}, "block_count is '1'"),
        ({"block_count": None}, "block_count is missing"),
        ({"embedding_length": 0}, "embedding_length is 0"),
        ({"attention.head_count": 0}, "head_count is 0"),
        ({"attention.head_count_kv": 3}, "does not divide"),
        ({"attention.head_count_kv": [2, 2]}, "1 whole numbers"),
        ({"attention.key_length": 3}, "turns 3 of 3"),
        ({"rope.dimension_count": 8}, "turns 8 of 4"),
        ({"rope.freq_base": 0.0}, "rope.freq_base"),
        ({"rope.freq_base": float("nan")}, "rope.freq_base"),
        ({"rope.freq_base": float("inf")}, "rope.freq_base"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "epsilon"),
        ({"rope.scaling.type": "magic"}, "'magic' is not supported"),
        ({"expert_count": 8}, "experts"),
    ],
)
def test_wrong_hyper_parameters(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_bytes(tmp_path, gguf_model(config))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported"),
        ({"architectures": None}, "'none' is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 2.5}, "hidden_size is 2.5"),
        ({"hidden_size": 10**300}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 1}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "magic"}}, "'magic' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 2, "high_freq_factor": 2}}, "high_freq"),
        ({"rope_parameters": 3}, "rope_parameters is 3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "bits = None"),
        ({"hidden_act": "relu"}, "'relu'"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_wrong_config(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(hf_folder(tmp_path / "model", config))
