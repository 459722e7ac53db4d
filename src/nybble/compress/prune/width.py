"""The pass that makes layers narrower: fewer feed-forward neurons, query heads, or groups of heads.

A neuron is an input of `down` with the rows of gate and up that compute it; a head is a run of inputs of `o` with its
rows of q; a group is a head of k and v with all the query heads that read it. Layers are narrowed in the order in which
they run, each on what those before it give once they are narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from nybble.backends.torch import Layer, TorchDecoder
from nybble.compress.calibration.groups import walk_groups
from nybble.compress.calibration.samples import Calibration, load_calibration
from nybble.compress.calibration.stream import Moments, Stream
from nybble.compress.methods import Progress
from nybble.compress.prune.layers import PrunedLayer
from nybble.compress.prune.options import PruneOptions
from nybble.compress.prune.shares import allocate, whole
from nybble.compress.prune.sparsegpt import error_of
from nybble.compress.prune.units import (
    Fitted,
    Inputs,
    activation_score,
    channels,
    choose,
    fluctuation_score,
    keep_best,
    refit,
    without,
)
from nybble.compress.safetensors.model import FolderModel
from nybble.compress.safetensors.options import DEFAULT_SAMPLES
from nybble.core.errors import ConfigError
from nybble.core.spec import LayerSpec, ModelSpec
from nybble.formats.safetensors import read_json
from nybble.formats.safetensors_writer import write_json
from nybble.formats.stored import Stored, floats_as

Told = Callable[[int, str], None]
_ROUND_TO = 32
_STATE = "widths.json"


@dataclass(frozen=True, slots=True)
class Widths:
    """What stays of a layer."""

    num_kv_heads: int
    heads_per_group: int
    ffn_size: int

    @property
    def num_q_heads(self) -> int:
        return self.num_kv_heads * self.heads_per_group


class Width:
    """A `Walk`."""

    def __init__(self, model: FolderModel, options: PruneOptions) -> None:
        self._model = model
        self._options = options
        self._compensate = options.compensate or "refit"
        self._global = options.scope == "global"
        self._widths = [self._uniform(layer) for layer in model.spec.layers]
        self._calibration: Calibration | None = None
        self._stream: Stream | None = None
        if self._compensate == "bias" and model.spec.family != "llama":
            raise ConfigError(
                f"compensate bias needs a bias behind attention, which the family {model.spec.family} has no room for: "
                "use refit"
            )
        if self._widths == [_widths(layer) for layer in model.spec.layers]:
            raise ConfigError("the widths that stay are those that the model has: ask for smaller shares")

    @property
    def passes(self) -> float:
        """As Walk.passes."""
        return 1 if self._global else 0

    @property
    def sources(self) -> list[int]:
        """As Walk.sources."""
        return list(range(self._model.num_layers))

    def uniform_spec(self) -> ModelSpec:
        """If every layer keeps the same share."""
        layers = self._model.spec.layers
        return replace(
            self._model.spec,
            layers=tuple(self._spec(one, self._uniform(one)) for one in layers),
        )

    def _uniform(self, layer: LayerSpec) -> Widths:
        options, per_group = self._options, layer.num_q_heads // layer.num_kv_heads
        return Widths(
            whole(layer.num_kv_heads, options.kv_groups),
            whole(per_group, options.heads),
            whole(layer.ffn_size, options.ffn_width, options.round_to or _ROUND_TO),
        )

    def _spec(self, layer: LayerSpec, widths: Widths) -> LayerSpec:
        narrow = replace(
            layer, num_q_heads=widths.num_q_heads, num_kv_heads=widths.num_kv_heads, ffn_size=widths.ffn_size
        )
        return replace(narrow, qkv_bias=True, out_bias=True) if self._compensate == "bias" else narrow

    def plan(self, progress: Progress) -> Mapping[str, object]:
        """As Walk.plan."""
        self._calibration = load_calibration(
            self._model.checkpoint, self._options.calibration(DEFAULT_SAMPLES), progress
        )
        return {"calibration": self._calibration.digest}

    @torch.no_grad()
    def start(self, work: Path, first: int, told: Told) -> list[str]:
        """As Walk.start."""
        assert self._calibration is not None
        decoder = TorchDecoder(self._model.checkpoint, context=self._model.spec.context_length)
        self._stream = Stream(decoder, torch.from_numpy(self._calibration.token_ids))
        if self._global:
            state = work / _STATE
            if not state.exists():
                self._stream.start(work, 0)
                found = self._allocate(self._stream, told)
                write_json(state, {"widths": [[w.num_kv_heads, w.heads_per_group, w.ffn_size] for w in found]})
            values = read_json(state)["widths"]
            assert isinstance(values, list)
            self._widths = [Widths(*map(int, one)) for one in values]
        self._stream.start(work, first)
        return [self._calibration.coverage()]

    def _allocate(self, stream: Stream, told: Told) -> list[Widths]:
        """Widths by importance: units of all layers are compared, each with the mean and spread of its own layer."""
        spec, options = self._model.spec, self._options
        kv_scores, ffn_scores = [], []
        for index, one in enumerate(spec.layers):
            layer = stream.layer(index)
            moments = stream.collect(index, layer, full=False)
            score = self._score()
            size = one.num_q_heads // one.num_kv_heads * one.head_dim
            kv_scores.append(score(layer.weights["attn.o"], _inputs(moments[1], "attn.o"), size))
            ffn_scores.append(score(layer.weights["ffn.down"], _inputs(moments[3], "ffn.down"), 1))
            stream.advance(index, layer)
            told(self._weights_of(index), f"importance in layer {index}")
        kv = allocate(kv_scores, options.kv_groups, 1)
        ffn = allocate(ffn_scores, options.ffn_width, options.round_to or _ROUND_TO)
        return [
            Widths(groups, self._uniform(one).heads_per_group, neurons)
            for one, groups, neurons in zip(spec.layers, kv, ffn, strict=True)
        ]

    def _score(self) -> Callable[[torch.Tensor, Inputs, int], torch.Tensor]:
        """What a unit adds to the outputs; around its mean, if that is kept."""
        return fluctuation_score if self._compensate == "bias" else activation_score

    def _weights_of(self, index: int) -> int:
        return sum(module.num_weights for module in self._model.modules(index))

    @torch.no_grad()
    def layer(self, position: int, told: Told) -> PrunedLayer:
        """As Walk.layer."""
        assert self._stream is not None
        layer, widths = self._stream.layer(position), self._widths[position]
        before = self._model.spec.layers[position]
        if self._compensate == "bias":
            _add_biases(layer, before)
        narrow = self._spec(before, widths)
        figures: dict[str, object] = {}
        parts = [sum(m.num_weights for m in self._model.modules(position) if m.group == g) for g in range(4)]

        def on_group(group: int, moments: Moments) -> torch.Tensor | None:
            told(parts[group], f"layer {position}")
            if group == 1 and (narrow.num_q_heads, narrow.num_kv_heads) != (before.num_q_heads, before.num_kv_heads):
                return self._narrow_attention(layer, before, widths, moments, figures)
            if group == 3 and narrow.ffn_size != before.ffn_size:
                self._narrow_ffn(layer, widths.ffn_size, moments, figures)
            return None

        walk_groups(self._stream, position, layer, on_group, full=True)
        tensors = {name: self._stored(position, name, layer.weights[name]) for name in layer.weights}
        return PrunedLayer(position, narrow, tensors, figures)

    def _narrow_attention(
        self, layer: Layer, before: LayerSpec, widths: Widths, moments: Moments, figures: dict[str, object]
    ) -> torch.Tensor:
        """Groups first, then heads of those that stay. Gives the inputs of o that stay."""
        weight, inputs, size = layer.weights["attn.o"], _inputs(moments, "attn.o"), before.head_dim
        per_group = before.num_q_heads // before.num_kv_heads
        groups = torch.arange(before.num_kv_heads)
        if widths.num_kv_heads < before.num_kv_heads:
            groups = self._choose(weight, inputs, per_group * size, widths.num_kv_heads, 1)
        heads = channels(groups, per_group)
        if widths.heads_per_group < per_group:
            part = channels(heads, size)
            left = Inputs(inputs.hessian[part][:, part], inputs.mean[part])
            chosen = self._choose(self._fit(weight, inputs, part).weight, left, size, widths.num_q_heads, len(groups))
            heads = heads[chosen]
        kept, kv_kept = channels(heads, size), channels(groups, size)
        fitted = self._fit(weight, inputs, kept)
        figures["attn.o"] = _lost(weight, fitted, kept, inputs)
        layer.weights["attn.o"] = fitted.weight
        if fitted.bias is not None:
            layer.weights["attn.o.bias"] = layer.weights["attn.o.bias"] + fitted.bias
        for part_name, rows in (("q", kept), ("k", kv_kept), ("v", kv_kept)):
            for name in (f"attn.{part_name}", f"attn.{part_name}.bias"):
                if name in layer.weights:
                    layer.weights[name] = layer.weights[name][rows]
        layer.spec = replace(before, num_q_heads=widths.num_q_heads, num_kv_heads=widths.num_kv_heads)
        return kept

    def _narrow_ffn(self, layer: Layer, num_keep: int, moments: Moments, figures: dict[str, object]) -> None:
        weight, inputs = layer.weights["ffn.down"], _inputs(moments, "ffn.down")
        kept = self._choose(weight, inputs, 1, num_keep, 1)
        fitted = self._fit(weight, inputs, kept)
        figures["ffn.down"] = _lost(weight, fitted, kept, inputs)
        layer.weights["ffn.down"] = fitted.weight
        for name in ("ffn.gate", "ffn.up"):
            layer.weights[name] = layer.weights[name][kept]

    def _choose(self, weight: torch.Tensor, inputs: Inputs, size: int, num_keep: int, num_groups: int) -> torch.Tensor:
        if self._compensate == "refit":
            return choose(weight, inputs, size, num_keep, num_groups=num_groups)
        return keep_best(self._score()(weight, inputs, size), num_keep, num_groups)

    def _fit(self, weight: torch.Tensor, inputs: Inputs, kept: torch.Tensor) -> Fitted:
        if self._compensate == "refit":
            return refit(weight, inputs, kept)
        return without(weight, inputs, kept, with_bias=self._compensate == "bias")

    def _stored(self, index: int, name: str, values: torch.Tensor) -> Stored:
        array = np.ascontiguousarray(values.numpy())
        canonical = f"layers.{index}.{name}"
        if canonical in self._model.sources:
            return self._model.plain(canonical, array)
        return floats_as(array, self._model.dtype)  # a bias that the model did not have

    def figures(self, measured: list[Mapping[str, object]]) -> dict[str, object]:
        """As Walk.figures."""
        found: dict[str, object] = {}
        for name, words in (("attn.o", "attention"), ("ffn.down", "ffn")):
            values = [float(str(one[name])) for one in measured if name in one]
            if values:
                found[f"mean_{words}_output_error"] = sum(values) / len(values)
        return found

    def scratch(self) -> list[str]:
        """As Walk.scratch."""
        return [_STATE, *Stream.files()]


def _widths(layer: LayerSpec) -> Widths:
    return Widths(layer.num_kv_heads, layer.num_q_heads // layer.num_kv_heads, layer.ffn_size)


def _inputs(moments: Moments, name: str) -> Inputs:
    """The diagonal alone becomes a diagonal matrix: scores that look at it need no more."""
    hessian = moments.hessian(name)
    return Inputs(torch.diag(hessian) if hessian.ndim == 1 else hessian, moments.mean())


def _lost(weight: torch.Tensor, fitted: Fitted, kept: torch.Tensor, inputs: Inputs) -> float:
    """The share of the mean square of a linear's outputs that is lost; of what varies in them, if there is a bias."""
    spread = torch.zeros_like(weight)
    spread[:, kept] = fitted.weight
    moments = inputs.hessian
    if fitted.bias is not None:
        moments = moments - torch.outer(inputs.mean, inputs.mean)
    return error_of(weight, spread, moments)


def _add_biases(layer: Layer, spec: LayerSpec) -> None:
    """Of zeros, where there are none: a format that has one behind attention has them before it too."""
    widths = {"q": spec.num_q_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
    for part, heads in widths.items():
        layer.weights.setdefault(f"attn.{part}.bias", torch.zeros(heads * spec.head_dim))
    layer.weights.setdefault("attn.o.bias", torch.zeros(layer.weights["attn.o"].shape[0]))
