"""A whole decoder in torch, run layer by layer from a mapped checkpoint: only one layer's weights are in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from nybble.backends.torch.layer import Layer, Observer, rms_norm, softcap
from nybble.backends.torch.rope import Rope
from nybble.checkpoint import Checkpoint
from nybble.core.errors import CheckpointError

# Told the index of the layer, then as an Observer.
LayerObserver = Callable[[int, tuple[str, ...], torch.Tensor], None]


class TorchDecoder:
    """The decoder that a checkpoint's ModelSpec describes.

    weights: replacements for the checkpoint's tensors by canonical name, for example ones that want gradients.
    context: tokens that a sequence may reach, by which some rotary scalings choose their frequencies; None: as many as
    are run.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        context: int | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.dtype = dtype
        self.device = torch.device(device)
        self._context = context
        self._weights = dict(weights or {})

    def weight(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, decoded. Raises CheckpointError if it holds a NaN or an infinity."""
        replaced = self._weights.get(name)
        if replaced is not None:
            return replaced
        stored = self.checkpoint.tensors[name]
        values = torch.from_numpy(stored.to_float32())
        self.checkpoint.release(stored)
        if not torch.isfinite(values).all():
            raise CheckpointError(
                f"{self.checkpoint.path}: the tensor {name!r} holds a NaN or an infinity: get it again"
            )
        return values.to(self.device, self.dtype)

    def layer(self, index: int, num_tokens: int) -> Layer:
        """Layer `index` with its weights, ready for sequences of up to `num_tokens` tokens."""
        spec = self.spec.layers[index]
        prefix = f"layers.{index}."
        names = [name for name in self.checkpoint.tensors if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): self.weight(name) for name in names}
        rope = Rope.make(spec.rope, num_tokens, context=self._context or num_tokens, device=self.device)
        return Layer(spec, weights, eps=self.spec.norm_eps, rope=rope)

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
        """[batch, tokens] -> [batch, tokens, hidden_size]. table: `weight("embed")`, if it has been decoded already."""
        table = self.weight("embed") if table is None else table
        return F.embedding(token_ids.to(self.device), table) * self.spec.embed_scale

    def final(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream after the last layer -> logits."""
        x = rms_norm(x, self.weight("final_norm"), self.spec.norm_eps)
        head = self.weight("embed" if self.spec.tied_head else "head")
        return softcap(F.linear(x, head) * self.spec.logit_scale, self.spec.logit_softcap)

    def logits(self, token_ids: torch.Tensor, observe: LayerObserver | None = None) -> torch.Tensor:
        """[batch, tokens] ids -> [batch, tokens, vocab_size]. Every sequence starts from an empty context."""
        x = self.embed(token_ids)
        for index in range(len(self.spec.layers)):
            x = self.layer(index, token_ids.shape[1]).forward(x, _bound(observe, index))
        return self.final(x)


def _bound(observe: LayerObserver | None, index: int) -> Observer | None:
    if observe is None:
        return None
    return lambda names, x: observe(index, names, x)
