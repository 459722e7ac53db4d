"""The decoder as an `nn.Module`: the same arithmetic as `TorchDecoder`, with all weights in memory and trainable.

Parameters have their canonical names with slashes for dots (`attn/q`), because torch takes a dot for a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nybble.backends.torch.layer import Layer, rms_norm
from nybble.backends.torch.rope import Rope
from nybble.core.spec import LayerSpec, ModelSpec, RopeSpec

Result = TypeVar("Result")
# Makes of the final hidden states [batch, tokens, hidden_size], the head [vocab_size, hidden_size] and the outputs of
# the layers that were asked for whatever a caller wants: a loss, logits.
Head = Callable[[torch.Tensor, torch.Tensor, list[torch.Tensor]], Result]
# Makes a layer's linear from its name, its input and the weights: for adapters beside a weight.
LayerFactory = Callable[[LayerSpec, Mapping[str, torch.Tensor], float, Rope], Layer]


def _plain_layer(spec: LayerSpec, weights: Mapping[str, torch.Tensor], eps: float, rope: Rope) -> Layer:
    return Layer(spec, weights, eps=eps, rope=rope)


class TrainableLayer(nn.Module):
    """One layer. transforms: what a weight becomes before it is used, by its name: fake quantisation, for example.

    A name may be in `transforms` only: then the module makes the weight by itself, of no argument.
    """

    def __init__(
        self,
        spec: LayerSpec,
        weights: Mapping[str, torch.Tensor],
        *,
        eps: float,
        transforms: Mapping[str, nn.Module],
        make: LayerFactory,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.eps = eps
        self._make = make
        self.weights = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(w) for name, w in weights.items()})
        self.transforms = nn.ModuleDict({name.replace(".", "/"): module for name, module in transforms.items()})

    def effective(self) -> dict[str, torch.Tensor]:
        """The weights that the forward pass uses, by their names in the layer."""
        found = {}
        for key, weight in self.weights.items():
            found[key.replace("/", ".")] = self.transforms[key](weight) if key in self.transforms else weight
        for key, module in self.transforms.items():
            if key not in self.weights:
                found[key.replace("/", ".")] = module()
        return found

    def layer(self, rope: Rope) -> Layer:
        """What computes with the effective weights; those that no transform changes are the parameters themselves."""
        return self._make(self.spec, self.effective(), self.eps, rope)

    def forward(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """x: [batch, tokens, hidden_size]."""
        return self.layer(rope).forward(x)


class TrainableDecoder(nn.Module):
    """The decoder that `spec` describes.

    weights: every tensor by its canonical name, but those that a transform makes by itself. transforms: by canonical
    name. recompute: keep no activations inside of layers, and compute them again for the gradients.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, torch.Tensor],
        *,
        transforms: Mapping[str, nn.Module] | None = None,
        recompute: bool = False,
        make: LayerFactory = _plain_layer,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.recompute = recompute
        transforms = transforms or {}
        inner = {name: tensor for name, tensor in weights.items() if not name.startswith("layers.")}
        self.outer = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in inner.items()})
        self.outer_transforms = nn.ModuleDict({n: m for n, m in transforms.items() if not n.startswith("layers.")})
        self.layers = nn.ModuleList(
            TrainableLayer(one, _inside(weights, i), eps=spec.norm_eps, transforms=_inside(transforms, i), make=make)
            for i, one in enumerate(spec.layers)
        )
        self._ropes: dict[tuple[RopeSpec, int, torch.device], Rope] = {}

    def forward(self, token_ids: torch.Tensor, head: Head[Result], keep: tuple[int, ...] = ()) -> Result:
        """token_ids: [batch, tokens]. keep: indices of layers whose outputs `head` wants.

        `head` is called in here because shards of the head's weight are together only as long as this runs.
        """
        spec = self.spec
        embed = self._outer("embed")
        x = F.embedding(token_ids, embed) * spec.embed_scale
        kept = []
        for index, layer in enumerate(self.blocks()):
            rope = self.rope(layer.spec.rope, token_ids.shape[1], token_ids.device)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope)
            if index in keep:
                kept.append(x)
        x = rms_norm(x, self._outer("final_norm"), spec.norm_eps)
        return head(x, embed if spec.tied_head else self._outer("head"), kept)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] -> what the first layer reads, [batch, tokens, hidden_size]."""
        return F.embedding(token_ids, self._outer("embed")) * self.spec.embed_scale

    def logits(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] -> [batch, tokens, vocab_size], float32."""
        found: torch.Tensor = self(token_ids, lambda x, weight, _: head_logits(self.spec, x, weight))
        return found

    def blocks(self) -> list[TrainableLayer]:
        """The layers, with their type."""
        return [cast("TrainableLayer", layer) for layer in self.layers]

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are weights of the model, by canonical name."""
        yield from self.outer.items()
        for i, layer in enumerate(self.blocks()):
            for key, parameter in layer.weights.items():
                yield f"layers.{i}.{key.replace('/', '.')}", parameter

    def effective(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the forward pass uses, by canonical name, layer by layer."""
        for name in self.outer:
            yield name, self._outer(name)
        for i, layer in enumerate(self.blocks()):
            for name, weight in layer.effective().items():
                yield f"layers.{i}.{name}", weight

    def _outer(self, name: str) -> torch.Tensor:
        weight: torch.Tensor = self.outer[name]
        if name in self.outer_transforms:
            weight = self.outer_transforms[name](weight)
        return weight

    def rope(self, spec: RopeSpec, tokens: int, device: torch.device) -> Rope:
        """The rotary embedding of a layer, for sequences of so many tokens."""
        key = (spec, tokens, device)
        if key not in self._ropes:
            self._ropes[key] = Rope.make(spec, tokens, context=tokens, device=device)
        return self._ropes[key]


def head_logits(spec: ModelSpec, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Final hidden states -> logits, float32."""
    logits = F.linear(x, weight).float()
    if spec.logit_scale != 1:
        logits = logits * spec.logit_scale
    return logits if spec.logit_softcap is None else spec.logit_softcap * torch.tanh(logits / spec.logit_softcap)


_T = TypeVar("_T")


def _inside(named: Mapping[str, _T], index: int) -> dict[str, _T]:
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): one for name, one in named.items() if name.startswith(prefix)}
