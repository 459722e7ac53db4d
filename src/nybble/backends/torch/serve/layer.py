"""One decoder layer over the paged cache, from LayerSpec: nothing here knows the name of an architecture.

The residual stream is added up inside of the norms, so that each of them reads and writes it once:

    (x, residual) -> qkv -> rope, store -> attention -> o -> norm(+ residual) -> gate, up -> down -> (x, residual)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.backends.torch import ops
from nybble.backends.torch.parallel.group import Group
from nybble.backends.torch.serve.adapter import LayerAdapters
from nybble.backends.torch.serve.cache import LayerCache
from nybble.backends.torch.serve.inputs import StepTensors
from nybble.backends.torch.serve.weights import LayerWeights
from nybble.core.spec import LayerSpec


@dataclass(frozen=True, slots=True)
class Turn:
    """Cosines and sines [tokens, rotary_dim / 2] of a step's positions."""

    cos: torch.Tensor
    sin: torch.Tensor


class ServeLayer:
    """spec: of this rank's part. group: the ranks whose outputs add up."""

    def __init__(self, spec: LayerSpec, weights: LayerWeights, *, eps: float, group: Group) -> None:
        self.spec = spec
        self._weights = weights
        self._eps = eps
        self._group = group

    @property
    def weights(self) -> LayerWeights:
        return self._weights

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        step: StepTensors,
        turn: Turn,
        cache: LayerCache,
        adapters: LayerAdapters | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: what the layer before adds to the residual stream [tokens, hidden_size]; both come out alike.

        residual: None before the first layer, where x is the stream itself.
        """
        weights = self._weights
        normed, residual = add_and_norm(x, residual, weights.vector("attn_norm"), self._eps)
        mixed = self._attention(normed, step, turn, cache, adapters)
        y = self._output("attn.o", "attn.post_norm", mixed, adapters)
        normed, residual = add_and_norm(y, residual, weights.vector("ffn_norm"), self._eps)
        gate, up = weights.ffn_in(normed, adapters)
        mixed = ops.gated_activation(gate, up, self.spec.activation)
        return self._output("ffn.down", "ffn.post_norm", mixed, adapters), residual

    def _attention(
        self, x: torch.Tensor, step: StepTensors, turn: Turn, cache: LayerCache, adapters: LayerAdapters | None
    ) -> torch.Tensor:
        spec, weights = self.spec, self._weights
        q, k, v = (part.reshape(len(x), -1, spec.head_dim) for part in weights.qkv(x, adapters))
        rope = spec.rope
        q = ops.rope_store_kv(
            q,
            k,
            v,
            turn.cos,
            turn.sin,
            rope.rotary_dim,
            rope.interleaved,
            cache.k,
            cache.v,
            step.slots,
            q_norm=weights.vector("attn.q_norm") if spec.qk_norm else None,
            k_norm=weights.vector("attn.k_norm") if spec.qk_norm else None,
            eps=self._eps,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )
        out = ops.paged_attention(
            q,
            cache.k,
            cache.v,
            step.block_tables,
            step.cu_seqlens_q,
            step.kv_lens,
            sm_scale=spec.sm_scale,
            window=spec.window,
            softcap=spec.attn_softcap,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
            max_q_len=step.max_q_len,
            num_decodes=step.num_decodes,
        )
        return out.reshape(len(x), -1)

    def _output(self, name: str, norm: str, mixed: torch.Tensor, adapters: LayerAdapters | None) -> torch.Tensor:
        """A linear that ends a half of the layer: its parts on all ranks, added up."""
        y = self._group.all_reduce(self._weights.linear(name, mixed, adapters))
        return ops.rms_norm(y, self._weights.vector(norm), self._eps) if self.spec.post_norms else y


def add_and_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and that sum."""
    if residual is None:
        return ops.rms_norm(x, weight, eps), x
    normed, total = ops.rms_norm(x, weight, eps, residual)
    return normed, total
