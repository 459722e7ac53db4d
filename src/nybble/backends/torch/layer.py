"""One decoder layer in torch, cut where its linears read, so that a pass can change weights between the cuts.

    x -> attention_input -> [q k v] -> attention_mix -> [o] -> add_attention
      -> ffn_input -> [gate up] -> ffn_mix -> [down] -> add_ffn -> next x

Everything is built from LayerSpec; nothing here knows the name of an architecture. Weights are ordinary tensors, so
gradients flow to whichever of them ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping

import torch
import torch.nn.functional as F

from nybble.backends.torch.rope import Rope
from nybble.core.spec import LayerSpec

try:
    from nybble.backends.torch.flash import flash_attention
except ImportError:  # Triton is not there
    flash_attention = None  # type: ignore[assignment]

# Linears that read the same input, in the order in which they run.
LINEAR_GROUPS: tuple[tuple[str, ...], ...] = (
    ("attn.q", "attn.k", "attn.v"),
    ("attn.o",),
    ("ffn.gate", "ffn.up"),
    ("ffn.down",),
)

# Told the names of linears inside the layer and the input [..., in_features] that all of them read.
Observer = Callable[[tuple[str, ...], torch.Tensor], None]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalised in float32 over the last dimension, whatever the type of x."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype)


def softcap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Squeezes x smoothly into (-cap, cap)."""
    return x if cap is None else cap * torch.tanh(x / cap)


def causal_mask(num_tokens: int, window: int | None, device: torch.device | None = None) -> torch.Tensor:
    """[tokens, tokens], true where a token (row) sees another (column)."""
    position = torch.arange(num_tokens, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < (num_tokens if window is None else window))


class Layer:
    """weights: by their canonical name inside the layer (`attn.q`, `ffn_norm`, `attn.q.bias`, ...). May be changed."""

    def __init__(self, spec: LayerSpec, weights: Mapping[str, torch.Tensor], *, eps: float, rope: Rope) -> None:
        self.spec = spec
        self.weights: MutableMapping[str, torch.Tensor] = dict(weights)
        self.eps = eps
        self._rope = rope

    def forward(self, x: torch.Tensor, observe: Observer | None = None) -> torch.Tensor:
        """x: [batch, tokens, hidden_size], positions from 0; each sequence sees only itself."""
        attention = self.attention_input(x)
        _tell(observe, 0, attention)
        mixed = self.attention_mix(attention)
        _tell(observe, 1, mixed)
        x = self.add_attention(x, mixed)
        ffn = self.ffn_input(x)
        _tell(observe, 2, ffn)
        mixed = self.ffn_mix(ffn)
        _tell(observe, 3, mixed)
        return self.add_ffn(x, mixed)

    def attention_input(self, x: torch.Tensor) -> torch.Tensor:
        """What q, k and v read."""
        return rms_norm(x, self.weights["attn_norm"], self.eps)

    def attention_mix(self, normed: torch.Tensor) -> torch.Tensor:
        """From the input of q, k and v to that of o."""
        spec = self.spec
        batch, tokens, _ = normed.shape
        heads = {}
        for part, count in (("q", spec.num_q_heads), ("k", spec.num_kv_heads), ("v", spec.num_kv_heads)):
            y = self._linear(f"attn.{part}", normed).view(batch, tokens, count, spec.head_dim)
            if spec.qk_norm and part != "v":
                y = rms_norm(y, self.weights[f"attn.{part}_norm"], self.eps)
            y = y.transpose(1, 2)
            heads[part] = y if part == "v" else self._rope.rotate(y)
        out = self._attend(heads["q"], heads["k"], heads["v"])
        return out.transpose(1, 2).reshape(batch, tokens, spec.num_q_heads * spec.head_dim)

    def add_attention(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The residual stream after attention. mixed: the input of o."""
        y = self._linear("attn.o", mixed)
        return x + (rms_norm(y, self.weights["attn.post_norm"], self.eps) if self.spec.post_norms else y)

    def ffn_input(self, x: torch.Tensor) -> torch.Tensor:
        """What gate and up read."""
        return rms_norm(x, self.weights["ffn_norm"], self.eps)

    def ffn_mix(self, normed: torch.Tensor) -> torch.Tensor:
        """From the input of gate and up to that of down."""
        gate = self._linear("ffn.gate", normed)
        gate = F.silu(gate) if self.spec.activation == "silu" else F.gelu(gate, approximate="tanh")
        return gate * self._linear("ffn.up", normed)

    def add_ffn(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        """The residual stream after the layer. mixed: the input of down."""
        y = self._linear("ffn.down", mixed)
        return x + (rms_norm(y, self.weights["ffn.post_norm"], self.eps) if self.spec.post_norms else y)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[name], self.weights.get(f"{name}.bias"))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[batch, heads, tokens, head_dim], as it is given."""
        spec = self.spec
        if q.is_cuda and flash_attention is not None:  # no mask and no scores in memory
            by_token = (x.transpose(1, 2) for x in (q, k, v))
            out = flash_attention(*by_token, scale=spec.sm_scale, window=spec.window, softcap=spec.attn_softcap)
            return out.transpose(1, 2)
        tokens = q.shape[2]
        grouped = spec.num_q_heads != spec.num_kv_heads
        if spec.attn_softcap is None:
            whole = spec.window is None or spec.window >= tokens
            hidden = None if whole else causal_mask(tokens, spec.window, q.device)  # what a mask hides is computed too
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=hidden, is_causal=whole, scale=spec.sm_scale, enable_gqa=grouped
            )
        if grouped:
            repeats = spec.num_q_heads // spec.num_kv_heads
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        mask = causal_mask(tokens, spec.window, q.device)
        scores = softcap(q @ k.transpose(-1, -2) * spec.sm_scale, spec.attn_softcap)
        scores = scores.masked_fill(~mask, float("-inf"))
        return torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v


def _tell(observe: Observer | None, group: int, x: torch.Tensor) -> None:
    if observe is not None:
        observe(LINEAR_GROUPS[group], x)
