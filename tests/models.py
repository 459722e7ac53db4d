"""Small random models of every family, as Hugging Face folders and as GGUF files, for tests.

They are written with other people's tools (transformers, gguf), so a test that reads them does not check nybble against
itself. torch and transformers are imported late: most tests need neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
_MERGES = ("t h", "th e", "a n", "i n", "e r", "an d", "Ġ t", "Ġ the", "Ġ a", "o n", "l o", "lo w", "low er")
CHAT_TEMPLATE = "{% for m in messages %}<|bos|>{{ m.role }}\n{{ m.content }}<|eos|>{% endfor %}"

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 256 + len(_MERGES),
    "eos_token_id": 257 + len(_MERGES),
    "pad_token_id": 258 + len(_MERGES),
    "tie_word_embeddings": False,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5},
    "mistral": {"rms_norm_eps": 1e-5, "sliding_window": None, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32, "tie_word_embeddings": True, "sliding_window": 24, "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        "head_dim": 32, "tie_word_embeddings": True, "sliding_window": 24, "query_pre_attn_scalar": 32,
        "num_hidden_layers": 7, "num_key_value_heads": 1,
    },
    "phi3": {"rms_norm_eps": 1e-5, "sliding_window": None},
}  # fmt: skip


def vocab_tokens() -> list[str]:
    """The bytes in order of their code points, the merged tokens, then the special ones."""
    from tokenizers.pre_tokenizers import ByteLevel

    return [*sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in _MERGES), *SPECIAL_TOKENS]


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE with a few merges: `tokenizer.json` and `tokenizer_config.json`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = vocab_tokens()
    ordinary = {token: i for i, token in enumerate(tokens[: -len(SPECIAL_TOKENS)])}
    tokenizer = Tokenizer(models.BPE(vocab=ordinary, merges=[tuple(m.split()) for m in _MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos, pad = SPECIAL_TOKENS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": pad,
        "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def make_tiny(family: str, folder: Path, seed: int = 0, *, shards: bool = False, **overrides: Any) -> Path:
    """A small model of `family` with random weights in `folder`; `overrides` are fields of its config."""
    import torch
    import transformers

    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
        "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    }
    config_class, model_class = classes[family]
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    config = config_class(**{"vocab_size": len(vocab_tokens()), **_COMMON, **_OWN[family], **overrides})
    model = model_class(config).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide that they are not used
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centre = 1.0 if "norm" in name and not family.startswith("gemma") else 0.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="64KB" if shards else "5GB")
    write_tokenizer(folder)
    return folder


_GGUF_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
    "post_attention_layernorm": "ffn_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def gguf_name(name: str, arch: str) -> str:
    """The GGUF name of a Hugging Face tensor."""
    if not name.startswith("model.layers."):
        stem, kind = name.rsplit(".", 1)
        top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        return f"{top[stem]}.{kind}"
    _, _, layer, inner = name.split(".", 3)
    stem, kind = inner.rsplit(".", 1)
    if arch.startswith("gemma") and stem == "post_attention_layernorm":
        return f"blk.{layer}.post_attention_norm.{kind}"
    return f"blk.{layer}.{_GGUF_LAYER[stem]}.{kind}"


def interleave(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of q or k from pairs half a head apart to pairs side by side, as llama files have them."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def to_gguf(folder: Path, path: Path, quant: str = "F32", *, alignment: int | None = None) -> Path:
    """The model of `folder` as a GGUF file; matrices in `quant`, vectors in F32."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text("utf-8"))
    family = str(config["model_type"]).removesuffix("_text")
    arch = "llama" if family == "mistral" else family
    writer = gguf.GGUFWriter(path, arch)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    _add_config(writer, config, arch)
    _add_tokenizer(writer, config)
    kind = gguf.GGMLQuantizationType[quant]
    weights: dict[str, npt.NDArray[np.float32]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    for name, values in weights.items():
        if "q_proj" in name or "k_proj" in name:
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = interleave(values, heads) if arch == "llama" else values
        if arch.startswith("gemma") and values.ndim == 1:
            values = values + 1
        values = np.ascontiguousarray(values, np.float32)
        if values.ndim == 1 or quant == "F32":
            writer.add_tensor(gguf_name(name, arch), values)
        else:
            writer.add_tensor(gguf_name(name, arch), gguf.quants.quantize(values, kind), raw_dtype=kind)
    _add_rope_tensors(writer, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rope_parameters(config: dict[str, Any], layer_type: str = "full_attention") -> dict[str, Any]:
    """The rope parameters of a config that transformers 5 wrote."""
    parameters: dict[str, Any] = config["rope_parameters"]
    return dict(parameters.get(layer_type, parameters))


def _add_config(writer: Any, config: dict[str, Any], arch: str) -> None:
    import gguf

    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = rope_parameters(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if arch.startswith("gemma") or (arch == "phi3" and config.get("sliding_window")):
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    kind = rope.get("rope_type")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        original = rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "longrope":
        stretch = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(stretch) / np.log(original))))


def _add_tokenizer(writer: Any, config: dict[str, Any]) -> None:
    tokens = vocab_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - len(SPECIAL_TOKENS)) + [3] * len(SPECIAL_TOKENS))
    writer.add_token_merges(list(_MERGES))
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_rope_tensors(writer: Any, config: dict[str, Any]) -> None:
    """What a rope needs besides numbers: GGUF writes Llama 3's scaling as one divisor per frequency."""
    rope = rope_parameters(config)
    if rope.get("rope_type") == "longrope":
        for length in ("short", "long"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))
    if rope.get("rope_type") == "llama3":
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelengths
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32))
