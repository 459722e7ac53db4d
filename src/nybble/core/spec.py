"""A model is data: frozen descriptions of a decoder that every backend can run.

Nothing here knows about files, tensors' bytes or hardware. Layers may differ from each other in any field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]
RopeScalingKind = Literal["none", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the rotary frequencies are changed to reach further than the original context."""

    kind: RopeScalingKind = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # multiplies cos and sin; None: the kind's own formula
    short_factors: tuple[float, ...] = ()  # longrope, one divisor per frequency
    long_factors: tuple[float, ...] = ()  # longrope
    freq_factors: tuple[float, ...] = ()  # one divisor per frequency, as GGUF's rope_freqs tensor gives them


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of one layer."""

    base: float
    rotary_dim: int  # how many leading dimensions of each head turn
    interleaved: bool = False  # pairs (2i, 2i+1) as in GGUF llama files, instead of (i, i + rotary_dim/2)
    scaling: RopeScaling = RopeScaling()


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: attention and a gated feed-forward part, each behind an RMS norm."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rope: RopeSpec
    sm_scale: float
    activation: Activation = "silu"
    window: int | None = None  # a token sees itself and window - 1 tokens before it
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMS norm over head_dim of q and k, before rope
    post_norms: bool = False  # RMS norms on the outputs of attention and feed-forward, before they are added
    attn_softcap: float | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A whole decoder."""

    family: str
    vocab_size: int
    hidden_size: int
    context_length: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    tied_head: bool
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
