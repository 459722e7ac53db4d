"""Phi 3: q, k, v in one tensor and gate, up in another; long contexts by LongRoPE."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nybble.core.fields import Fields
from nybble.core.spec import ModelSpec, RopeScaling, RopeSpec
from nybble.families.common import (
    GGUF_NAMES,
    HF_NAMES,
    Mapped,
    Source,
    gguf_scaling,
    gguf_shape,
    hf_rope,
    hf_scaling,
    hf_shape,
    map_names,
)
from nybble.families.llama import build


def from_gguf(
    f: Fields, *, vocab_size: int, tied: bool, short_factors: tuple[float, ...], long_factors: tuple[float, ...]
) -> Mapped:
    shape = gguf_shape(f)
    scaling = gguf_scaling(f)
    if short_factors and long_factors:
        original = f.integer("rope.scaling.original_context_length", shape.context, low=2, high=1 << 31)
        magnitude = f.optional_number("rope.scaling.attn_factor")
        scaling = _longrope(original, short_factors, long_factors, magnitude, shape.context / original)
    rotary = f.integer("rope.dimension_count", shape.head_dim, high=1 << 12)
    rope = RopeSpec(f.number("rope.freq_base", 10000.0, low=1.0), rotary, scaling=scaling)
    window = f.integer("attention.sliding_window", None, low=0, high=1 << 31) or None
    spec = build("phi3", shape, rope, vocab_size=vocab_size, tied=tied, windows=[window] * shape.layers)
    return Mapped(spec, _fused(spec, GGUF_NAMES, "blk.{i}.attn_qkv.weight", "blk.{i}.ffn_up.weight"))


def from_hf(f: Fields, *, has: frozenset[str]) -> Mapped:
    shape = hf_shape(f)
    parameters, base = hf_rope(f)
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if kind in ("longrope", "su"):
        original = f.integer("original_max_position_embeddings", shape.context, low=2, high=1 << 31)
        original = parameters.integer("original_max_position_embeddings", original, low=2, high=1 << 31)
        short, long = parameters.numbers("short_factor"), parameters.numbers("long_factor")
        magnitude = parameters.optional_number("attention_factor")
        stretch = parameters.number("factor", shape.context / original)
        scaling = _longrope(original, short, long, magnitude, stretch)
    else:
        scaling = hf_scaling(parameters, shape.context)
    partial = parameters.number("partial_rotary_factor", f.number("partial_rotary_factor", 1.0, high=1.0), high=1.0)
    rope = RopeSpec(base, int(shape.head_dim * partial), scaling=scaling)
    window = f.integer("sliding_window", None, high=1 << 31)
    tied = f.flag("tie_word_embeddings") or "lm_head.weight" not in has
    spec = build("phi3", shape, rope, vocab_size=f.integer("vocab_size"), tied=tied, windows=[window] * shape.layers)
    prefix = "model.layers.{i}."
    qkv, gate_up = prefix + "self_attn.qkv_proj.weight", prefix + "mlp.gate_up_proj.weight"
    return Mapped(spec, _fused(spec, HF_NAMES, qkv, gate_up))


def _longrope(
    original: int, short: tuple[float, ...], long: tuple[float, ...], magnitude: float | None, stretch: float
) -> RopeScaling:
    if magnitude is None:
        magnitude = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    return RopeScaling(
        "longrope", original_context=original, attention_factor=magnitude, short_factors=short, long_factors=long
    )


def _fused(spec: ModelSpec, names: Mapping[str, str], qkv: str, gate_up: str) -> dict[str, Source]:
    """Slices of rows of the fused tensors: q, then k, then v; gate, then up."""
    sources = map_names(spec, names)
    for i, layer in enumerate(spec.layers):
        q, kv = layer.num_q_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        for name, begin, end in (("q", 0, q), ("k", q, q + kv), ("v", q + kv, q + 2 * kv)):
            sources[f"layers.{i}.attn.{name}"] = Source(qkv.format(i=i), (begin, end))
        for name, begin in (("gate", 0), ("up", layer.ffn_size)):
            sources[f"layers.{i}.ffn.{name}"] = Source(gate_up.format(i=i), (begin, begin + layer.ffn_size))
    return sources
