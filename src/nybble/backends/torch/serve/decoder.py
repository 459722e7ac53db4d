"""The whole decoder over a paged cache: an embedding, layers on their devices, a final norm and a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from nybble.backends.torch.ops.low_bit import DenseLinear
from nybble.backends.torch.parallel.group import Group
from nybble.backends.torch.parallel.shard import Shard
from nybble.backends.torch.rope import Rope
from nybble.backends.torch.serve.adapter import StepAdapters
from nybble.backends.torch.serve.cache import PagedCache
from nybble.backends.torch.serve.inputs import StepTensors
from nybble.backends.torch.serve.layer import ServeLayer, Turn, add_and_norm
from nybble.backends.torch.serve.weights import Embedding, LayerWeights, make_linear, vector
from nybble.checkpoint import Tensor
from nybble.core.spec import RopeSpec


class Decoder:
    """A rank's part of a model. devices: of each layer; the first one embeds, `device` has the final norm and the head.

    Raises:
        CheckpointError: a tensor cannot be used.
    """

    def __init__(
        self,
        shard: Shard,
        *,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
        devices: Sequence[torch.device],
        group: Group,
    ) -> None:
        spec = self.spec = shard.spec
        self.dtype = dtype
        self.device = device
        self.devices = tuple(devices)
        self._group = group
        self._vocab_widths = tuple(end - begin for begin, end in shard.vocab)
        self._ropes: dict[tuple[RopeSpec, torch.device], Rope] = {}
        head = shard.tensors["embed" if spec.tied_head else "head"]
        self._head = make_linear(head, device, dtype)
        shared = self._head.weight if spec.tied_head and isinstance(self._head, DenseLinear) else None
        self._embed = Embedding(
            shard.tensors["embed"],
            device,
            dtype,
            begin=shard.vocab[group.rank][0],
            whole=group.size == 1,
            table=shared,
        )
        self.layers: list[ServeLayer] = []
        for index, (layer, place) in enumerate(zip(spec.layers, self.devices, strict=True)):
            prefix = f"layers.{index}."
            weights = LayerWeights(partial(_below, shard.tensors, prefix), place, dtype)
            self.layers.append(ServeLayer(layer, weights, eps=spec.norm_eps, group=group))
            if (layer.rope, place) not in self._ropes:
                self._ropes[layer.rope, place] = Rope.make(layer.rope, context, context=context, device=place)
        self._final_norm = vector(shard.tensors["final_norm"], device, torch.float32)

    @property
    def nbytes(self) -> int:
        """Of all weights of this part."""
        layers = sum(layer.weights.nbytes for layer in self.layers)
        return layers + self._embed.nbytes + self._head.bytes + self._final_norm.nbytes

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, hidden_size]."""
        x = self._group.all_reduce(self._embed(token_ids))
        return x if self.spec.embed_scale == 1.0 else x * self.spec.embed_scale

    def forward(
        self, x: torch.Tensor, step: StepTensors, cache: PagedCache, adapters: StepAdapters | None = None
    ) -> torch.Tensor:
        """From what `embed` gives to the final-normed hidden states [tokens, hidden_size], on `device`."""
        residual: torch.Tensor | None = None
        turns: dict[tuple[RopeSpec, torch.device], Turn] = {}
        steps = {step.token_ids.device: step}
        for index, (layer, place) in enumerate(zip(self.layers, self.devices, strict=True)):
            if place not in steps:
                steps[place] = step.to(place)
            at = layer.spec.rope, place
            if at not in turns:
                rope, positions = self._ropes[at], steps[place].positions
                turns[at] = Turn(rope.cos[positions], rope.sin[positions])
            x, residual = layer.forward(
                x.to(place),
                None if residual is None else residual.to(place),
                steps[place],
                turns[at],
                cache.layers[index],
                None if adapters is None else adapters.layer(index),
            )
        residual = None if residual is None else residual.to(self.device)
        return add_and_norm(x.to(self.device), residual, self._final_norm, self.spec.norm_eps)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden_size] -> float32 [rows, vocab_size]."""
        y = self._group.gather_columns(self._head(hidden), self._vocab_widths).float()
        if self.spec.logit_scale != 1.0:
            y = y * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return y if cap is None else cap * torch.tanh(y / cap)


def _below(tensors: Mapping[str, Tensor], prefix: str, name: str) -> Tensor | None:
    """The tensor of this name in the layer that the prefix says."""
    return tensors.get(prefix + name)
