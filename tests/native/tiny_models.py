"""Small random decoders for the native core: specs that reach every branch, weights in any encoding."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nybble import _native
from nybble.core.spec import LayerSpec, ModelSpec, RopeSpec
from nybble.quant.codebook import pack_codebook
from nybble.quant.float8 import pack_float8
from nybble.quant.formats import FORMATS
from nybble.quant.grouped import pack_grouped
from nybble.quant.reference import dequantize

Floats = npt.NDArray[np.float32]
# Where the halves lie that scale a whole block.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


@dataclass(frozen=True)
class TinyModel:
    spec: ModelSpec
    ropes: list[tuple[Floats, float]]
    raw: dict[str, tuple[str, tuple[int, ...], bytes]]
    weights: dict[str, Floats]

    def empty(self, *, threads: int = 1, isa: str | None = None, act: str = "int8", kv: str = "f16") -> _native.Model:
        """Without its tensors."""
        spec = self.spec
        return _native.Model(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            norm_eps=spec.norm_eps,
            layers=[native_layer(layer, *rope) for layer, rope in zip(spec.layers, self.ropes, strict=True)],
            tied_head=spec.tied_head,
            embed_scale=spec.embed_scale,
            logit_scale=spec.logit_scale,
            logit_softcap=spec.logit_softcap or 0.0,
            threads=threads,
            isa=isa,
            act=act,
            kv=kv,
        )

    def native(self, orders: Mapping[str, npt.NDArray[np.int32]] | None = None, **options: Any) -> _native.Model:
        """orders: of the inputs of some matrices. options: those of `empty`."""
        model = self.empty(**options)
        for name, (fmt, shape, data) in self.raw.items():
            rows = (1, *shape) if len(shape) == 1 else shape
            model.set_tensor(name, fmt, *rows, data, (orders or {}).get(name))
        model.finish()
        return model


def native_layer(layer: LayerSpec, inv_freq: Floats, scale: float) -> _native.LayerConfig:
    return _native.LayerConfig(
        q_heads=layer.num_q_heads,
        kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        ffn_size=layer.ffn_size,
        sm_scale=layer.sm_scale,
        activation=layer.activation,
        window=layer.window or 0,
        qkv_bias=layer.qkv_bias,
        out_bias=layer.out_bias,
        qk_norm=layer.qk_norm,
        post_norms=layer.post_norms,
        attn_softcap=layer.attn_softcap or 0.0,
        inv_freq=inv_freq,
        rope_scale=scale,
        rope_interleaved=layer.rope.interleaved,
    )


def random_matrix(fmt: str, shape: tuple[int, int], rng: np.random.Generator) -> bytes:
    """Random codes and scales, with values of about 1 / sqrt(columns)."""
    rows, cols = shape
    if fmt in ("F32", "F16", "BF16"):
        values = (rng.standard_normal(shape) / np.sqrt(cols)).astype(np.float32)
        if fmt == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return values.astype(np.float32 if fmt == "F32" else np.float16).tobytes()
    form = FORMATS[fmt]
    if form.ggml_type is None:
        return random_dialect(fmt, shape, rng)
    blocks = rng.integers(0, 256, (rows * cols // form.block_size, form.block_bytes), dtype=np.uint8)
    if fmt == "MXFP4":
        blocks[:, 0] = rng.integers(120, 124, len(blocks))
        return blocks.tobytes()

    def set_scales(scales: Floats) -> None:
        for offset in HALVES[fmt]:
            blocks[:, offset : offset + 2] = scales.astype(np.float16)[:, None].view(np.uint8)

    set_scales(np.ones(len(blocks), np.float32))
    rms = np.sqrt((dequantize(form, blocks.tobytes()) ** 2).mean())
    set_scales((rng.uniform(0.5, 1.5, len(blocks)) / rms / np.sqrt(cols)).astype(np.float32))
    return blocks.tobytes()


def random_dialect(fmt: str, shape: tuple[int, int], rng: np.random.Generator) -> bytes:
    kind, block = fmt.rsplit("_", 1)
    size = (shape[0], shape[1] // int(block))
    scales = (rng.uniform(0.5, 1.5, size) / np.sqrt(shape[1])).astype(np.float32)
    if kind in ("NF4", "FP4"):
        codes = rng.integers(0, 16, shape).astype(np.uint8)
        table: Literal["nf4", "fp4"] = "nf4" if kind == "NF4" else "fp4"
        return pack_codebook(table, codes, 2 * scales.reshape(-1), 64)[1].tobytes()
    if kind == "F8":
        codes = (rng.integers(0, 2, shape) << 7 | rng.integers(0, 119, shape)).astype(np.uint8)  # up to 240, both signs
        return pack_float8(codes, scales[:, :1] / 32, None)[1].tobytes()
    bits = int(kind[1:])
    codes = rng.integers(0, 1 << bits, shape).astype(np.uint8)
    zeros = rng.integers(0, 1 << bits, size)
    return pack_grouped(codes, scales / (1 << bits - 1), zeros, bits=bits)[1].tobytes()


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    hidden = spec.hidden_size
    out: dict[str, tuple[int, ...]] = {"embed": (spec.vocab_size, hidden), "final_norm": (hidden,)}
    if not spec.tied_head:
        out["head"] = (spec.vocab_size, hidden)
    for i, layer in enumerate(spec.layers):
        p, q, kv = f"layers.{i}.", layer.num_q_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        out |= {p + "attn.q": (q, hidden), p + "attn.k": (kv, hidden), p + "attn.v": (kv, hidden)}
        out |= {p + "attn.o": (hidden, q), p + "attn_norm": (hidden,), p + "ffn_norm": (hidden,)}
        out |= {p + "ffn.gate": (layer.ffn_size, hidden), p + "ffn.up": (layer.ffn_size, hidden)}
        out[p + "ffn.down"] = (hidden, layer.ffn_size)
        if layer.qkv_bias:
            out |= {p + "attn.q.bias": (q,), p + "attn.k.bias": (kv,), p + "attn.v.bias": (kv,)}
        if layer.out_bias:
            out[p + "attn.o.bias"] = (hidden,)
        if layer.qk_norm:
            out |= {p + "attn.q_norm": (layer.head_dim,), p + "attn.k_norm": (layer.head_dim,)}
        if layer.post_norms:
            out |= {p + "attn.post_norm": (hidden,), p + "ffn.post_norm": (hidden,)}
    return out


def build(spec: ModelSpec, formats: Sequence[str], seed: int = 0) -> TinyModel:
    """The matrices take the formats in turn."""
    rng = np.random.default_rng(seed)
    raw: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    weights: dict[str, Floats] = {}
    matrices = 0
    for name, shape in shapes(spec).items():
        if len(shape) == 1:
            vector = rng.normal(0 if name.endswith("bias") else 1, 0.2, shape).astype(np.float32)
            raw[name], weights[name] = ("F32", shape, vector.tobytes()), vector
            continue
        fmt = formats[matrices % len(formats)]
        matrices += 1
        data = random_matrix(fmt, (shape[0], shape[1]), rng)
        raw[name], weights[name] = (fmt, shape, data), dequantize(FORMATS[fmt], data).reshape(shape)
    ropes = []
    for layer in spec.layers:
        half = layer.rope.rotary_dim // 2
        ropes.append(((layer.rope.base ** (-np.arange(half) / half)).astype(np.float32), 1.0))
    return TinyModel(spec, ropes, raw, weights)


def layer(heads: int, kv_heads: int, head_dim: int, ffn: int, **changes: object) -> LayerSpec:
    base = LayerSpec(
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=ffn,
        rope=RopeSpec(base=10000.0, rotary_dim=head_dim),
        sm_scale=head_dim**-0.5,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


LLAMA = ModelSpec(
    family="llama",
    vocab_size=101,  # the last group of rows is not full
    hidden_size=256,
    context_length=1024,
    norm_eps=1e-5,
    layers=(layer(8, 2, 32, 512), layer(4, 4, 64, 256, rope=RopeSpec(500000.0, 64, interleaved=True))),
    tied_head=False,
)
QWEN = ModelSpec(
    family="qwen",
    vocab_size=64,
    hidden_size=96,
    context_length=1024,
    norm_eps=1e-6,
    # The query heads of a kv head fill one and a half blocks of 32.
    layers=(layer(6, 2, 16, 160, qkv_bias=True), layer(6, 2, 16, 96, qkv_bias=True, out_bias=True, qk_norm=True)),
    tied_head=True,
    logit_scale=0.5,
)
GEMMA = ModelSpec(
    family="gemma",
    vocab_size=77,
    hidden_size=64,
    context_length=1024,
    norm_eps=1e-6,
    layers=tuple(
        layer(
            3, 1, 32, 96, activation="gelu_tanh", window=window, qk_norm=True, post_norms=True, attn_softcap=5.0,
            rope=RopeSpec(base, 16), sm_scale=0.2,
        )
        for window, base in ((9, 10000.0), (None, 1000000.0), (300, 10000.0))
    ),
    tied_head=True,
    embed_scale=8.0,
    logit_softcap=3.0,
)  # fmt: skip
ODD = ModelSpec(  # widths that only float weights can have
    family="odd",
    vocab_size=33,
    hidden_size=40,
    context_length=1024,
    norm_eps=1e-6,
    layers=(layer(3, 1, 16, 72), layer(1, 1, 16, 30)),
    tied_head=False,
)

MODELS: dict[str, tuple[ModelSpec, tuple[str, ...]]] = {
    "llama-f32": (LLAMA, ("F32",)),
    "llama-q4_k": (LLAMA, ("Q4_K",)),
    "llama-k-mix": (LLAMA, ("Q4_K", "Q6_K", "F16", "Q3_K", "Q2_K", "Q5_K", "IQ4_XS")),
    "qwen-q8_0": (QWEN, ("Q8_0",)),
    "qwen-mix": (QWEN, ("Q4_0", "Q5_1", "BF16", "Q4_1", "Q5_0", "IQ4_NL", "MXFP4")),
    "llama-dialects": (
        LLAMA,
        ("U4_128", "NF4_64", "U8_128", "U2_32", "FP4_64", "U3_128", "U4_32", "U2_128", "F8_128"),
    ),
    "qwen-dialects": (QWEN, ("U8_32", "U3_32", "U4_32", "F8_32")),
    "gemma-f16": (GEMMA, ("F16",)),
    "gemma-q8_0": (GEMMA, ("Q8_0", "Q4_0")),
    "odd-f32": (ODD, ("F32", "BF16")),
}


@functools.cache
def tiny(name: str) -> TinyModel:
    return build(*MODELS[name])
