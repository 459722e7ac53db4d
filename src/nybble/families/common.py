"""What the families share: tensor names of both containers, canonical shapes, rope scaling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from nybble.core.errors import CheckpointError
from nybble.core.fields import Fields
from nybble.core.spec import LayerSpec, ModelSpec, RopeScaling

MAX_LAYERS = 1024


@dataclass(frozen=True, slots=True)
class Source:
    """Where a canonical tensor comes from. rows: only these rows of it; plus_one: the loader adds 1."""

    name: str
    rows: tuple[int, int] | None = None
    plus_one: bool = False


@dataclass(frozen=True, slots=True)
class Mapped:
    """A model as data, and where its tensors are."""

    spec: ModelSpec
    sources: Mapping[str, Source]


# Canonical name -> name in the file; {i} is the layer.
GGUF_NAMES = {
    "embed": "token_embd.weight",
    "head": "output.weight",
    "final_norm": "output_norm.weight",
    "attn_norm": "blk.{i}.attn_norm.weight",
    "attn.q": "blk.{i}.attn_q.weight",
    "attn.k": "blk.{i}.attn_k.weight",
    "attn.v": "blk.{i}.attn_v.weight",
    "attn.o": "blk.{i}.attn_output.weight",
    "attn.q.bias": "blk.{i}.attn_q.bias",
    "attn.k.bias": "blk.{i}.attn_k.bias",
    "attn.v.bias": "blk.{i}.attn_v.bias",
    "attn.o.bias": "blk.{i}.attn_output.bias",
    "attn.q_norm": "blk.{i}.attn_q_norm.weight",
    "attn.k_norm": "blk.{i}.attn_k_norm.weight",
    "attn.post_norm": "blk.{i}.post_attention_norm.weight",
    "ffn_norm": "blk.{i}.ffn_norm.weight",
    "ffn.gate": "blk.{i}.ffn_gate.weight",
    "ffn.up": "blk.{i}.ffn_up.weight",
    "ffn.down": "blk.{i}.ffn_down.weight",
    "ffn.post_norm": "blk.{i}.post_ffw_norm.weight",
}
HF_NAMES = {
    "embed": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "attn_norm": "model.layers.{i}.input_layernorm.weight",
    "attn.q": "model.layers.{i}.self_attn.q_proj.weight",
    "attn.k": "model.layers.{i}.self_attn.k_proj.weight",
    "attn.v": "model.layers.{i}.self_attn.v_proj.weight",
    "attn.o": "model.layers.{i}.self_attn.o_proj.weight",
    "attn.q.bias": "model.layers.{i}.self_attn.q_proj.bias",
    "attn.k.bias": "model.layers.{i}.self_attn.k_proj.bias",
    "attn.v.bias": "model.layers.{i}.self_attn.v_proj.bias",
    "attn.o.bias": "model.layers.{i}.self_attn.o_proj.bias",
    "attn.q_norm": "model.layers.{i}.self_attn.q_norm.weight",
    "attn.k_norm": "model.layers.{i}.self_attn.k_norm.weight",
    "ffn_norm": "model.layers.{i}.post_attention_layernorm.weight",
    "ffn.gate": "model.layers.{i}.mlp.gate_proj.weight",
    "ffn.up": "model.layers.{i}.mlp.up_proj.weight",
    "ffn.down": "model.layers.{i}.mlp.down_proj.weight",
}


def layer_shapes(layer: LayerSpec, hidden: int) -> dict[str, tuple[int, ...]]:
    """Canonical name inside a layer -> shape, weights as [out_features, in_features]."""
    q, kv = layer.num_q_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn.q": (q, hidden),
        "attn.k": (kv, hidden),
        "attn.v": (kv, hidden),
        "attn.o": (hidden, q),
        "ffn_norm": (hidden,),
        "ffn.gate": (layer.ffn_size, hidden),
        "ffn.up": (layer.ffn_size, hidden),
        "ffn.down": (hidden, layer.ffn_size),
    }
    if layer.qkv_bias:
        shapes |= {"attn.q.bias": (q,), "attn.k.bias": (kv,), "attn.v.bias": (kv,)}
    if layer.out_bias:
        shapes["attn.o.bias"] = (hidden,)
    if layer.qk_norm:
        shapes |= {"attn.q_norm": (layer.head_dim,), "attn.k_norm": (layer.head_dim,)}
    if layer.post_norms:
        shapes |= {"attn.post_norm": (hidden,), "ffn.post_norm": (hidden,)}
    return shapes


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this spec has, under its canonical name."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed": (spec.vocab_size, spec.hidden_size),
        "final_norm": (spec.hidden_size,),
    }
    if not spec.tied_head:
        shapes["head"] = (spec.vocab_size, spec.hidden_size)
    for i, layer in enumerate(spec.layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer_shapes(layer, spec.hidden_size).items()}
    return shapes


def map_names(spec: ModelSpec, names: Mapping[str, str], *, plus_one: bool = False) -> dict[str, Source]:
    """A source for every expected tensor. plus_one: norms are stored as their difference from 1."""
    sources = {}
    for canonical in expected_shapes(spec):
        layer, inner = "", canonical
        if canonical.startswith("layers."):
            _, layer, inner = canonical.split(".", 2)
        is_norm = inner.endswith("norm")
        sources[canonical] = Source(names[inner].format(i=layer), plus_one=plus_one and is_norm)
    return sources


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that every family reads in the same way."""

    hidden: int
    context: int
    eps: float
    q_heads: list[int]
    kv_heads: list[int]
    ffn: list[int]
    head_dim: int
    layers: int = field(default=0)


def gguf_shape(f: Fields) -> Shape:
    """From the metadata of a GGUF file, `f` prefixed with the architecture."""
    layers = f.integer("block_count", high=MAX_LAYERS)
    hidden = f.integer("embedding_length", high=1 << 20)
    q_heads = f.per_layer("attention.head_count", layers, high=1 << 14)
    kv_heads = f.per_layer("attention.head_count_kv", layers, q_heads[0], high=1 << 14)
    return Shape(
        hidden=hidden,
        context=f.integer("context_length", high=1 << 31),
        eps=f.number("attention.layer_norm_rms_epsilon", high=1.0),
        q_heads=q_heads,
        kv_heads=kv_heads,
        ffn=f.per_layer("feed_forward_length", layers),
        head_dim=f.integer("attention.key_length", max(1, hidden // q_heads[0]), high=1 << 12),
        layers=layers,
    )


def hf_shape(f: Fields) -> Shape:
    """From a config.json."""
    layers = f.integer("num_hidden_layers", high=MAX_LAYERS)
    hidden = f.integer("hidden_size", high=1 << 20)
    heads = f.integer("num_attention_heads", high=1 << 14)
    return Shape(
        hidden=hidden,
        context=f.integer("max_position_embeddings", high=1 << 31),
        eps=f.number("rms_norm_eps", 1e-6, high=1.0),
        q_heads=[heads] * layers,
        kv_heads=[f.integer("num_key_value_heads", heads, high=1 << 14)] * layers,
        ffn=[f.integer("intermediate_size", high=1 << 20)] * layers,
        head_dim=f.integer("head_dim", max(1, hidden // heads), high=1 << 12),
        layers=layers,
    )


def check_heads(spec: ModelSpec, where: str) -> ModelSpec:
    """The spec, if its heads and rotary dimensions fit. Raises CheckpointError."""
    for i, layer in enumerate(spec.layers):
        if layer.num_q_heads % layer.num_kv_heads:
            raise CheckpointError(
                f"{where}: layer {i} has {layer.num_q_heads} query heads for {layer.num_kv_heads} key heads, "
                "which does not divide: the file is damaged"
            )
        rotary = layer.rope.rotary_dim
        if rotary % 2 or not 0 < rotary <= layer.head_dim:
            raise CheckpointError(
                f"{where}: layer {i} turns {rotary} of {layer.head_dim} dimensions, get the file again"
            )
        scaling = layer.rope.scaling
        for factors in (scaling.short_factors, scaling.long_factors, scaling.freq_factors):
            if not all(1e-6 <= factor <= 1e6 for factor in factors):
                raise CheckpointError(f"{where}: layer {i} has a rope factor outside 1e-6 to 1e6, get the file again")
            if factors and len(factors) != rotary // 2:
                raise CheckpointError(
                    f"{where}: {len(factors)} rope factors for {rotary // 2} frequencies: the file is damaged"
                )
    return spec


def gguf_scaling(f: Fields, freq_factors: tuple[float, ...] = ()) -> RopeScaling:
    """Rope scaling from GGUF keys. Raises CheckpointError for a kind that is not supported."""
    kind = f.text("rope.scaling.type", "none")
    factor = f.number("rope.scaling.factor", 1.0, low=1e-6, high=1e6)
    if kind == "linear" and factor != 1.0:
        return RopeScaling("linear", factor, freq_factors=freq_factors)
    if kind == "yarn":
        original = f.integer(
            "rope.scaling.original_context_length", f.integer("context_length", high=1 << 31), high=1 << 31
        )
        return RopeScaling("yarn", factor, original, freq_factors=freq_factors)
    if kind not in ("none", "linear", "longrope"):
        raise CheckpointError(f"{f.where}: the rope scaling {kind!r} is not supported (known: linear, yarn, longrope)")
    return RopeScaling(freq_factors=freq_factors)


def hf_rope(f: Fields, layer_type: str | None = None) -> tuple[Fields, float]:
    """The rope parameters of a config (of a layer type, where they are nested) and the base.

    Newer configs have `rope_parameters`, older ones `rope_theta` and `rope_scaling`.
    """
    parameters = f.nested("rope_parameters" if f.has("rope_parameters") else "rope_scaling")
    if layer_type is not None and parameters.has(layer_type):
        parameters = parameters.nested(layer_type)
    base = parameters.number("rope_theta", f.number("rope_theta", 10000.0, low=1.0), low=1.0)
    return parameters, base


def hf_scaling(f: Fields, context: int) -> RopeScaling:
    """Rope scaling from the parameters that hf_rope gives."""
    kind = f.text("rope_type", f.text("type", "default"))
    if kind == "default":
        return RopeScaling()
    factor = f.number("factor", 1.0, low=1e-6, high=1e6)
    original = f.integer("original_max_position_embeddings", context, high=1 << 31)
    scaling = RopeScaling("linear", factor, original, attention_factor=f.optional_number("attention_factor"))
    if kind == "linear":
        return scaling
    if kind == "llama3":
        low = f.number("low_freq_factor")
        high = f.number("high_freq_factor", low=low)
        return dataclasses.replace(scaling, kind="llama3", low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn" and not f.has("mscale") and not f.has("mscale_all_dim") and f.flag("truncate", True):
        fast, slow = f.number("beta_fast", 32.0), f.number("beta_slow", 1.0)
        return dataclasses.replace(scaling, kind="yarn", beta_fast=fast, beta_slow=slow)
    raise CheckpointError(f"{f.where}: the rope type {kind!r} is not supported (known: linear, llama3, yarn, longrope)")
