"""config.json of a model that comes without one, from its ModelSpec: the way back from `nybble.families`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nybble.checkpoint import Checkpoint
from nybble.core.errors import CheckpointError
from nybble.core.rope import inverse_frequencies
from nybble.core.spec import ModelSpec, RopeScaling, RopeSpec

_MODELS = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
}
# What Llama 3 models were made with; GGUF keeps only the divisors that follow from them.
_LLAMA3_ORIGINAL, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0


def config_of(checkpoint: Checkpoint) -> dict[str, object]:
    """Raises CheckpointError for what a config.json cannot say."""
    spec, where = checkpoint.spec, str(checkpoint.path)
    if spec.family not in _MODELS:
        raise CheckpointError(f"{where}: folders have no architecture for the family {spec.family!r}")
    architecture, model_type = _MODELS[spec.family]
    first = spec.layers[0]
    for name in ("num_q_heads", "num_kv_heads", "head_dim", "ffn_size"):
        if len({getattr(layer, name) for layer in spec.layers}) > 1:
            raise CheckpointError(f"{where}: layers that differ in {name} cannot be said in a config.json")
    config: dict[str, object] = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": spec.hidden_size,
        "intermediate_size": first.ffn_size,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": first.num_q_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": _short(spec.norm_eps),
        "tie_word_embeddings": spec.tied_head,
        "attention_bias": first.qkv_bias if spec.family != "llama" else first.out_bias,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": checkpoint.bos_token_id,
        "eos_token_id": _one_or_many(checkpoint.eos_token_ids),
    }
    if spec.family == "llama":
        config["mlp_bias"] = False
    if spec.family.startswith("gemma"):
        config |= _gemma(spec)
    else:
        config["hidden_act"] = "silu"
        config |= _rope(first.rope, spec, where)
        config |= _windows(spec, where)
    if first.rope.rotary_dim != first.head_dim:
        config["partial_rotary_factor"] = first.rope.rotary_dim / first.head_dim
    said = {key: value for key, value in config.items() if value is not None}
    # Said even if there is none: some readers take an id that lies outside of a small vocabulary.
    return {**said, "pad_token_id": _pad_token_id(checkpoint)}


def _pad_token_id(checkpoint: Checkpoint) -> int | None:
    found = checkpoint.metadata.get("tokenizer.ggml.padding_token_id")
    return found if type(found) is int and 0 <= found < checkpoint.spec.vocab_size else None


def _short(value: float) -> float:
    """The shortest number that is the same in float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _one_or_many(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def _gemma(spec: ModelSpec) -> dict[str, object]:
    local = next((layer for layer in spec.layers if layer.window is not None), spec.layers[0])
    everywhere = next((layer for layer in spec.layers if layer.window is None), spec.layers[-1])
    kinds = ["full_attention" if layer.window is None else "sliding_attention" for layer in spec.layers]
    scalar = everywhere.sm_scale**-2
    config: dict[str, object] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-6) else scalar,
        "sliding_window": local.window,
        "layer_types": kinds,
        "attn_logit_softcapping": everywhere.attn_softcap,
        "final_logit_softcapping": spec.logit_softcap,
    }
    base = everywhere.rope.base
    if spec.family == "gemma2":
        return {**config, "rope_theta": base}
    scaling = everywhere.rope.scaling
    full: dict[str, object] = {"rope_type": "default", "rope_theta": base}
    if scaling.kind == "linear":
        full = {"rope_type": "linear", "factor": scaling.factor, "rope_theta": base}
    nested = {
        "full_attention": full,
        "sliding_attention": {"rope_type": "default", "rope_theta": local.rope.base},
    }
    # Nested for transformers 5; the older names for those before it.
    older: dict[str, object] = {"rope_theta": base, "rope_local_base_freq": local.rope.base}
    if scaling.kind == "linear":
        older["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
    return {**config, "rope_parameters": nested, **older}


def _rope(rope: RopeSpec, spec: ModelSpec, where: str) -> dict[str, object]:
    scaling = rope.scaling
    if scaling.freq_factors:
        scaling = _llama3(rope, where)
    values: dict[str, Any] = {}
    if scaling.kind in ("linear", "llama3", "yarn"):
        values = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    out: dict[str, object] = {"rope_theta": rope.base}
    if scaling.kind == "longrope":
        values = {
            "type": "longrope",
            "short_factor": list(scaling.short_factors),
            "long_factor": list(scaling.long_factors),
            "attention_factor": scaling.attention_factor,
        }
        out["original_max_position_embeddings"] = scaling.original_context
    if values:
        out["rope_scaling"] = values
    return out


def _llama3(rope: RopeSpec, where: str) -> RopeScaling:
    """The scaling whose divisors a GGUF file has, if it is the one that Llama 3 models use."""
    divisors = np.array(rope.scaling.freq_factors, np.float32)
    guess = RopeScaling(
        "llama3",
        round(float(divisors.max()), 3),
        _LLAMA3_ORIGINAL,
        low_freq_factor=_LLAMA3_LOW,
        high_freq_factor=_LLAMA3_HIGH,
    )
    plain, _ = inverse_frequencies(RopeSpec(rope.base, rope.rotary_dim), 1)
    scaled, _ = inverse_frequencies(RopeSpec(rope.base, rope.rotary_dim, scaling=guess), 1)
    if not np.allclose(plain / scaled, divisors, rtol=1e-4):
        raise CheckpointError(
            f"{where}: its rope_freqs are not those of Llama 3, so a config.json cannot say them: use the model's own "
            "folder instead"
        )
    return guess


def _windows(spec: ModelSpec, where: str) -> dict[str, object]:
    windows = {layer.window for layer in spec.layers}
    if windows == {None}:
        return {}
    plain = not any(layer.qkv_bias or layer.out_bias for layer in spec.layers)
    if len(windows) > 1 or (spec.family == "llama" and not plain):
        raise CheckpointError(f"{where}: the sliding windows of its layers cannot be said in a config.json")
    said: dict[str, object] = {"sliding_window": windows.pop()}
    if spec.family == "llama":  # with windows, Llama's decoder is called Mistral
        return {**said, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    if spec.family.startswith("qwen"):
        kinds = ["sliding_attention"] * len(spec.layers)
        return {**said, "use_sliding_window": True, "max_window_layers": 0, "layer_types": kinds}
    return said
