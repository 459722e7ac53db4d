"""The keys that describe a decoder in a GGUF file, from its ModelSpec: the way back from `nybble.families`."""

from __future__ import annotations

import math

import numpy as np

from nybble.checkpoint import Checkpoint
from nybble.core.errors import CheckpointError
from nybble.core.rope import inverse_frequencies
from nybble.core.spec import LayerSpec, ModelSpec, RopeScaling, RopeSpec
from nybble.formats.gguf_writer import Value

ARCHITECTURES = {family: family for family in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")}
PER_LAYER = "deci"  # llama's decoder with arrays of widths
_GEMMA_PERIOD = {"gemma2": 2, "gemma3": 6}  # every second or sixth layer sees everything; GGUF has no key for it
_GEMMA_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the models that divide by another width than head_dim


def model_keys(checkpoint: Checkpoint) -> tuple[dict[str, Value], list[str]]:
    """The keys, and sentences on what readers of the file will not know.

    Raises CheckpointError for what GGUF cannot say.
    """
    spec, where = checkpoint.spec, str(checkpoint.path)
    arch = architecture_of(spec, where)
    layer = spec.layers[-1]  # of Gemma's kinds of layers, one that sees everything
    if spec.family in _GEMMA_PERIOD:
        layer = next((one for one in spec.layers if one.window is None), layer)
    notes: list[str] = []
    keys: dict[str, Value] = {
        "context_length": spec.context_length,
        "embedding_length": spec.hidden_size,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "rope.freq_base": float(layer.rope.base),
        "vocab_size": spec.vocab_size,
    }
    keys |= width_keys(spec)
    keys |= _scaling(layer.rope, where, notes)
    if spec.family in _GEMMA_PERIOD:
        keys |= _gemma(spec, layer, where)
    else:
        keys |= _windows(spec, where, notes)
    general: dict[str, Value] = {"general.architecture": arch, "general.type": "model"}
    name = checkpoint.metadata.get("_name_or_path")
    general["general.name"] = str(name).rsplit("/", 1)[-1] if name else checkpoint.path.resolve().name
    return {**general, **{f"{arch}.{key}": value for key, value in keys.items()}}, notes


def architecture_of(spec: ModelSpec, where: str) -> str:
    """What GGUF calls the decoder. Layers that differ in width have a name of their own, which llama.cpp reads them by.

    Raises CheckpointError if there is none.
    """
    if spec.family not in ARCHITECTURES:
        raise CheckpointError(f"{where}: GGUF has no architecture for the family {spec.family!r}")
    if len({(one.num_q_heads, one.num_kv_heads, one.ffn_size) for one in spec.layers}) == 1:
        return ARCHITECTURES[spec.family]
    plain = all(one.window is None and one.rope.rotary_dim == one.head_dim for one in spec.layers)
    if spec.family not in ("llama", "qwen2") or not plain:
        raise CheckpointError(
            f"{where}: GGUF has no architecture for a decoder of the family {spec.family} whose layers differ in "
            "width, so they must all have the same"
        )
    return PER_LAYER


def width_keys(spec: ModelSpec) -> dict[str, Value]:
    """Without the architecture in front: a number for all layers, or an array where they differ."""
    first = spec.layers[0]
    return {
        "block_count": len(spec.layers),
        "feed_forward_length": _each([one.ffn_size for one in spec.layers]),
        "attention.head_count": _each([one.num_q_heads for one in spec.layers]),
        "attention.head_count_kv": _each([one.num_kv_heads for one in spec.layers]),
        "attention.key_length": first.head_dim,
        "attention.value_length": first.head_dim,
        "rope.dimension_count": first.rope.rotary_dim,
    }


def _each(values: list[int]) -> Value:
    return values[0] if len(set(values)) == 1 else np.array(values, np.int32)


def _scaling(rope: RopeSpec, where: str, notes: list[str]) -> dict[str, Value]:
    """llama3 and LongRoPE become tensors (see extra_tensors), the others keys."""
    scaling = rope.scaling
    if scaling.kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if scaling.kind == "yarn":
        plain = 0.1 * math.log(scaling.factor) + 1.0
        if scaling.attention_factor not in (None, plain) or (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
            notes.append(
                "YaRN's own attention factor or betas are not written: nybble's GGUF reader has no keys for it"
            )
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": scaling.original_context,
        }
    if scaling.kind == "longrope":
        keys: dict[str, Value] = {"rope.scaling.original_context_length": scaling.original_context}
        if scaling.attention_factor is not None:
            keys["rope.scaling.attn_factor"] = float(scaling.attention_factor)
        return keys
    return {}


def _gemma(spec: ModelSpec, layer: LayerSpec, where: str) -> dict[str, Value]:
    period, count = _GEMMA_PERIOD[spec.family], len(spec.layers)
    if any((one.window is not None) != (i % period < period - 1) for i, one in enumerate(spec.layers)):
        raise CheckpointError(
            f"{where}: its sliding layers are not the usual ones of {spec.family}, which GGUF readers take for granted"
        )
    width = spec.hidden_size // layer.num_q_heads if count == _GEMMA_LARGEST[spec.family] else layer.head_dim
    if not math.isclose(layer.sm_scale, 1.0 / math.sqrt(width), rel_tol=1e-6):
        raise CheckpointError(
            f"{where}: query_pre_attn_scalar is not {width}, which GGUF readers take for granted in {spec.family}"
        )
    local = next((one for one in spec.layers if one.window is not None), None)
    keys: dict[str, Value] = {}
    if local is not None and local.window is not None:
        keys["attention.sliding_window"] = local.window
        if spec.family == "gemma3":
            keys["rope.freq_base_swa"] = float(local.rope.base)
    if layer.attn_softcap is not None:
        keys["attn_logit_softcapping"] = float(layer.attn_softcap)
    if spec.logit_softcap is not None:
        keys["final_logit_softcapping"] = float(spec.logit_softcap)
    return keys


def _windows(spec: ModelSpec, where: str, notes: list[str]) -> dict[str, Value]:
    windows = set(dict.fromkeys(one.window for one in spec.layers))
    if windows == {None}:
        return {}
    if len(windows) > 1:
        raise CheckpointError(
            f"{where}: only some layers have a sliding window, which {spec.family} in GGUF cannot say"
        )
    window = windows.pop()
    assert window is not None
    if spec.family != "phi3":
        notes.append(f"the sliding window of {window} tokens is written; nybble reads it, llama.cpp does not")
    return {"attention.sliding_window": window}


def extra_tensors(spec: ModelSpec) -> dict[str, tuple[float, ...]]:
    """Divisors of the rotary frequencies, which GGUF keeps as tensors."""
    rope = spec.layers[-1].rope
    scaling = rope.scaling
    if scaling.kind == "llama3":
        plain, _ = inverse_frequencies(RopeSpec(rope.base, rope.rotary_dim, scaling=RopeScaling()), 1)
        scaled, _ = inverse_frequencies(rope, 1)
        return {"rope_freqs.weight": tuple((plain / scaled).astype(np.float32).tolist())}
    if scaling.kind == "longrope":
        return {
            "rope_factors_long.weight": scaling.long_factors,
            "rope_factors_short.weight": scaling.short_factors,
        }
    return {}
