"""The smallest whole models, written byte by byte, so that tests can get any part of them wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from formats import raw

HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 8, 12, 10, 4, 2, 4
CONFIG: dict[str, Any] = {
    "block_count": 1, "context_length": 64, "embedding_length": HIDDEN, "feed_forward_length": FFN,
    "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM,
    "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0,
}  # fmt: skip
SHAPES = {
    "token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,), "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (16, HIDDEN), "blk.0.attn_k.weight": (8, HIDDEN), "blk.0.attn_v.weight": (8, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, 16), "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (FFN, HIDDEN), "blk.0.ffn_up.weight": (FFN, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, FFN),
}  # fmt: skip
FUSED = {
    "blk.0.attn_qkv.weight": (32, HIDDEN), "blk.0.ffn_up.weight": (2 * FFN, HIDDEN),
}  # fmt: skip
HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCAB,
    "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": [3, 4],
    "bos_token_id": 1, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
HF_SHAPES = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,),
    **{
        f"model.layers.0.{name}.weight": shape
        for name, shape in {
            "input_layernorm": (HIDDEN,), "self_attn.q_proj": (16, HIDDEN), "self_attn.k_proj": (8, HIDDEN),
            "self_attn.v_proj": (8, HIDDEN), "self_attn.o_proj": (HIDDEN, 16), "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN),
        }.items()
    },
}  # fmt: skip


def _key(name: str, value: object) -> bytes:
    kind = {bool: raw.BOOL, int: raw.U32, float: raw.F32, str: raw.STRING, list: raw.ARRAY}[type(value)]
    return raw.key(name, kind, (raw.U32, value) if isinstance(value, list) else value)


def gguf_model(
    config: dict[str, Any] | None = None,
    shapes: dict[str, tuple[int, ...]] | None = None,
    extra: dict[str, Any] | None = None,
    arch: str = "llama",
    kind: int = 0,
) -> bytes:
    keys = [_key("general.architecture", arch)]
    keys += [_key(f"{arch}.{name}", value) for name, value in (CONFIG | (config or {})).items() if value is not None]
    keys += [_key(name, value) for name, value in (extra or {}).items()]
    infos, data = [], b""
    for i, (name, shape) in enumerate((SHAPES if shapes is None else shapes).items()):
        infos.append(raw.tensor_info(name, shape[::-1], kind, len(data)))
        values = np.full(shape, i, np.float32).tobytes()
        data += values + bytes(-len(values) % 32)
    return raw.gguf_bytes(keys, infos, data)


def hf_header(shapes: dict[str, tuple[int, ...]] = HF_SHAPES) -> tuple[dict[str, Any], bytes]:
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header, np.ones(at // 2, np.float16).tobytes()


def hf_folder(folder: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | (config or {})))
    raw.save(folder / "model.safetensors", raw.safetensors_bytes(*hf_header()))
    return folder
