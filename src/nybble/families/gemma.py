"""Gemma 2 and 3 (text): scaled embeddings, norms around both parts, sliding windows; soft-caps (2), q and k norms and
two rope bases (3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nybble.core.errors import CheckpointError
from nybble.core.fields import Fields
from nybble.core.spec import LayerSpec, ModelSpec, RopeScaling, RopeSpec
from nybble.families.common import (
    GGUF_NAMES,
    HF_NAMES,
    Mapped,
    Shape,
    gguf_scaling,
    gguf_shape,
    hf_rope,
    hf_scaling,
    hf_shape,
    map_names,
)

_HF_NAMES = HF_NAMES | {
    "attn.post_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "ffn_norm": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "ffn.post_norm": "model.layers.{i}.post_feedforward_layernorm.weight",
}
_LOCAL_BASE = 10000.0  # Gemma 3's sliding layers


@dataclass(frozen=True, slots=True)
class _Gemma:
    version: int
    window: int
    slides: list[bool]  # per layer
    local_rope: RopeSpec
    global_rope: RopeSpec
    sm_scale: float
    attn_softcap: float | None
    logit_softcap: float | None


def from_gguf(f: Fields, *, version: int, vocab_size: int, tied: bool) -> Mapped:
    shape = gguf_shape(f)
    rope = RopeSpec(
        base=f.number("rope.freq_base", 10000.0, low=1.0),
        rotary_dim=f.integer("rope.dimension_count", shape.head_dim, high=1 << 12),
        scaling=gguf_scaling(f),
    )
    local = RopeSpec(f.number("rope.freq_base_swa", _LOCAL_BASE, low=1.0), rope.rotary_dim) if version == 3 else rope
    # The two largest models divide by another width than head_dim; GGUF does not say so, the depth does.
    largest = shape.layers == (46 if version == 2 else 62)
    width = shape.hidden // shape.q_heads[0] if largest else shape.head_dim
    default_period = 2 if version == 2 else 6
    if isinstance(f.data.get(f.prefix + "attention.sliding_window_pattern"), list):
        raise CheckpointError(f"{f.where}: a sliding window pattern given as a list is not supported: convert it again")
    period = f.integer("attention.sliding_window_pattern", default_period)
    config = _Gemma(
        version,
        window=f.integer("attention.sliding_window", 4096, high=1 << 31),
        slides=[i % period < period - 1 for i in range(shape.layers)],
        local_rope=local,
        global_rope=rope,
        sm_scale=1.0 / math.sqrt(width),
        attn_softcap=f.optional_number("attn_logit_softcapping"),
        logit_softcap=f.optional_number("final_logit_softcapping"),
    )
    spec = _build(shape, config, vocab_size=vocab_size, tied=tied)
    return Mapped(spec, map_names(spec, GGUF_NAMES))


def from_hf(f: Fields, *, version: int, has: frozenset[str]) -> Mapped:
    shape = hf_shape(f)
    if not f.has("head_dim"):
        raise CheckpointError(f"{f.where}: head_dim is missing, get a complete config.json")
    parameters, base = hf_rope(f, "full_attention")
    global_rope = RopeSpec(base, shape.head_dim, scaling=hf_scaling(parameters, shape.context))
    local_rope = global_rope
    if version == 3:
        nested = f.nested("rope_parameters")
        local_base = f.number("rope_local_base_freq", _LOCAL_BASE, low=1.0)
        if nested.has("sliding_attention"):
            local_base = nested.nested("sliding_attention").number("rope_theta", local_base, low=1.0)
        local_rope = RopeSpec(local_base, shape.head_dim, scaling=RopeScaling())
    config = _Gemma(
        version,
        window=f.integer("sliding_window", 4096, high=1 << 31),
        slides=_hf_slides(f, version, shape.layers),
        local_rope=local_rope,
        global_rope=global_rope,
        sm_scale=1.0 / math.sqrt(f.number("query_pre_attn_scalar", float(shape.head_dim))),
        attn_softcap=f.optional_number("attn_logit_softcapping"),
        logit_softcap=f.optional_number("final_logit_softcapping"),
    )
    tied = f.flag("tie_word_embeddings", True) or "lm_head.weight" not in has
    spec = _build(shape, config, vocab_size=f.integer("vocab_size"), tied=tied)
    return Mapped(spec, map_names(spec, _HF_NAMES, plus_one=True))


def _hf_slides(f: Fields, version: int, layers: int) -> list[bool]:
    kinds = f.data.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return [kind == "sliding_attention" for kind in kinds]
    period = f.integer("sliding_window_pattern", 2 if version == 2 else 6)
    return [i % period < period - 1 for i in range(layers)]


def _build(shape: Shape, config: _Gemma, *, vocab_size: int, tied: bool) -> ModelSpec:
    layers = tuple(
        LayerSpec(
            num_q_heads=shape.q_heads[i],
            num_kv_heads=shape.kv_heads[i],
            head_dim=shape.head_dim,
            ffn_size=shape.ffn[i],
            rope=config.local_rope if slides else config.global_rope,
            sm_scale=config.sm_scale,
            activation="gelu_tanh",
            window=config.window if slides else None,
            qk_norm=config.version == 3,
            post_norms=True,
            attn_softcap=config.attn_softcap,
        )
        for i, slides in enumerate(config.slides)
    )
    return ModelSpec(
        f"gemma{config.version}",
        vocab_size,
        shape.hidden,
        shape.context,
        shape.eps,
        layers,
        tied,
        embed_scale=math.sqrt(shape.hidden),
        logit_softcap=config.logit_softcap,
    )
