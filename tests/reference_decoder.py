"""The decoder that ModelSpec describes, written to be read: numpy, float64, one whole sequence, no cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from nybble.core.spec import LayerSpec, ModelSpec

Array = npt.NDArray[np.float64]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def activate(x: Array, kind: str) -> Array:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softcap(x: Array, cap: float | None) -> Array:
    return x if cap is None else cap * np.tanh(x / cap)


def rotate(x: Array, layer: LayerSpec, inv_freq: Array, scale: float) -> Array:
    """x is [tokens, heads, head_dim]."""
    tokens = len(x)
    angles = np.arange(tokens)[:, None] * inv_freq[None, :]
    cos, sin = np.cos(angles)[:, None] * scale, np.sin(angles)[:, None] * scale
    rotary = 2 * len(inv_freq)
    out = x.copy()
    first = slice(0, rotary, 2) if layer.rope.interleaved else slice(0, rotary // 2)
    second = slice(1, rotary, 2) if layer.rope.interleaved else slice(rotary // 2, rotary)
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def attention(q: Array, k: Array, v: Array, layer: LayerSpec) -> Array:
    """q is [tokens, q heads, head_dim]; k and v have the kv heads."""
    tokens = len(q)
    group = layer.num_q_heads // layer.num_kv_heads
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = softcap(np.einsum("qhd,khd->hqk", q, k) * layer.sm_scale, layer.attn_softcap)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    visible = (distance >= 0) & (distance < (layer.window or tokens))
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(tokens, -1)


def logits(
    spec: ModelSpec,
    weights: Mapping[str, npt.NDArray[np.float32]],
    ropes: list[tuple[npt.NDArray[np.float32], float]],
    token_ids: list[int],
) -> Array:
    """The logits after each token; `ropes` holds inv_freq and scale of each layer."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    eps = spec.norm_eps
    x = w["embed"][token_ids] * spec.embed_scale
    tokens = len(x)
    for i, layer in enumerate(spec.layers):
        p = f"layers.{i}."
        inv_freq, scale = ropes[i][0].astype(np.float64), ropes[i][1]
        normed = rms_norm(x, w[p + "attn_norm"], eps)
        heads = {}
        for part in "qkv":
            y = normed @ w[p + f"attn.{part}"].T
            if layer.qkv_bias:
                y = y + w[p + f"attn.{part}.bias"]
            heads[part] = y.reshape(tokens, -1, layer.head_dim)
        for part in "qk":
            if layer.qk_norm:
                heads[part] = rms_norm(heads[part], w[p + f"attn.{part}_norm"], eps)
            heads[part] = rotate(heads[part], layer, inv_freq, scale)
        y = attention(heads["q"], heads["k"], heads["v"], layer) @ w[p + "attn.o"].T
        if layer.out_bias:
            y = y + w[p + "attn.o.bias"]
        x = x + (rms_norm(y, w[p + "attn.post_norm"], eps) if layer.post_norms else y)
        normed = rms_norm(x, w[p + "ffn_norm"], eps)
        gate = activate(normed @ w[p + "ffn.gate"].T, layer.activation)
        y = (gate * (normed @ w[p + "ffn.up"].T)) @ w[p + "ffn.down"].T
        x = x + (rms_norm(y, w[p + "ffn.post_norm"], eps) if layer.post_norms else y)
    x = rms_norm(x, w["final_norm"], eps)
    return softcap(x @ w["embed" if spec.tied_head else "head"].T * spec.logit_scale, spec.logit_softcap)
