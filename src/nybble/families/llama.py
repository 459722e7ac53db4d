"""Llama 2 and 3, Mistral, SmolLM: the plain decoder. Qwen 2 and 3 are the same with biases or q and k norms."""

from __future__ import annotations

import math

from nybble.core.fields import Fields
from nybble.core.spec import LayerSpec, ModelSpec, RopeSpec
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


def from_gguf(
    f: Fields,
    *,
    family: str = "llama",
    vocab_size: int,
    tied: bool,
    freq_factors: tuple[float, ...],
    has: frozenset[str],
    interleaved: bool = True,
) -> Mapped:
    """has: names of the file's tensors, which tell about biases and norms."""
    shape = gguf_shape(f)
    rope = RopeSpec(
        base=f.number("rope.freq_base", 10000.0, low=1.0),
        rotary_dim=f.integer("rope.dimension_count", shape.head_dim, high=1 << 12),
        interleaved=interleaved,
        scaling=gguf_scaling(f, freq_factors),
    )
    window = f.integer("attention.sliding_window", None, low=0, high=1 << 31) or None
    spec = build(
        family,
        shape,
        rope,
        vocab_size=vocab_size,
        tied=tied,
        windows=[window] * shape.layers,
        qkv_bias="blk.0.attn_q.bias" in has,
        out_bias="blk.0.attn_output.bias" in has,
        qk_norm="blk.0.attn_q_norm.weight" in has,
    )
    return Mapped(spec, map_names(spec, GGUF_NAMES))


def from_hf(f: Fields, *, family: str = "llama", has: frozenset[str]) -> Mapped:
    shape = hf_shape(f)
    parameters, base = hf_rope(f)
    rope = RopeSpec(base, shape.head_dim, scaling=hf_scaling(parameters, shape.context))
    spec = build(
        family,
        shape,
        rope,
        vocab_size=f.integer("vocab_size"),
        tied=f.flag("tie_word_embeddings") or "lm_head.weight" not in has,
        windows=_hf_windows(f, family, shape.layers),
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in has,
        out_bias="model.layers.0.self_attn.o_proj.bias" in has,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in has,
    )
    return Mapped(spec, map_names(spec, HF_NAMES))


def _hf_windows(f: Fields, family: str, layers: int) -> list[int | None]:
    if family.startswith("qwen") and not f.flag("use_sliding_window"):
        return [None] * layers
    window = f.integer("sliding_window", None, high=1 << 31)
    kinds = f.data.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    first = f.integer("max_window_layers", 0, low=0) if family.startswith("qwen") else 0
    return [window if i >= first else None for i in range(layers)]


def build(
    family: str,
    shape: Shape,
    rope: RopeSpec,
    *,
    vocab_size: int,
    tied: bool,
    windows: list[int | None],
    qkv_bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
) -> ModelSpec:
    layers = tuple(
        LayerSpec(
            num_q_heads=shape.q_heads[i],
            num_kv_heads=shape.kv_heads[i],
            head_dim=shape.head_dim,
            ffn_size=shape.ffn[i],
            rope=rope,
            sm_scale=1.0 / math.sqrt(shape.head_dim),
            window=windows[i],
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
        )
        for i in range(shape.layers)
    )
    return ModelSpec(family, vocab_size, shape.hidden, shape.context, shape.eps, layers, tied)
