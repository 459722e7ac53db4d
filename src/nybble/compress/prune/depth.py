"""The pass that takes whole layers out: those with the least influence, or greedily those whose absence costs least.

Greedy by loss is SLEB (Song et al. 2024, arXiv 2402.09025): a layer is taken out for good when the text costs least
without it, then all others are tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from nybble.backends.torch import TorchDecoder
from nybble.compress.calibration.samples import Calibration, load_calibration
from nybble.compress.calibration.stream import Stream
from nybble.compress.methods import Progress
from nybble.compress.prune.influence import BlockInfluence, least_influential, mean_loss
from nybble.compress.prune.layers import PrunedLayer
from nybble.compress.prune.options import PruneOptions
from nybble.compress.safetensors.model import FolderModel
from nybble.compress.safetensors.options import DEFAULT_SAMPLES
from nybble.formats.safetensors import read_json
from nybble.formats.safetensors_writer import write_json

Told = Callable[[int, str], None]
_STATE = "removed.json"
_LOSS_SAMPLES = 8  # each round runs nearly every layer after every other one


class Depth:
    """A `Walk`."""

    def __init__(self, model: FolderModel, options: PruneOptions) -> None:
        self._model = model
        self._drop = options.num_dropped(model.num_layers)
        self._by_loss = options.by == "loss"
        self._options = options
        self._calibration: Calibration | None = None
        self._removed: list[int] = []
        self._scores: list[object] = []

    @property
    def passes(self) -> float:
        """As Walk.passes."""
        return self._drop * self._model.num_layers / 2 if self._by_loss else 1

    @property
    def sources(self) -> list[int]:
        """As Walk.sources."""
        return [i for i in range(self._model.num_layers) if i not in self._removed]

    def plan(self, progress: Progress) -> Mapping[str, object]:
        """As Walk.plan."""
        samples = _LOSS_SAMPLES if self._by_loss else DEFAULT_SAMPLES
        self._calibration = load_calibration(self._model.checkpoint, self._options.calibration(samples), progress)
        return {"calibration": self._calibration.digest}

    @torch.no_grad()
    def start(self, work: Path, first: int, told: Told) -> list[str]:
        """As Walk.start."""
        assert self._calibration is not None
        state = work / _STATE
        if state.exists():
            found = read_json(state)
            self._removed = [int(str(i)) for i in _list(found["removed"])]
            self._scores = _list(found["scores"])
        decoder = TorchDecoder(self._model.checkpoint, context=self._model.spec.context_length)
        token_ids = torch.from_numpy(self._calibration.token_ids)
        if self._by_loss:
            outer = {name: decoder.weight(name) for name in self._model.outer()}  # decoded once
            decoder = TorchDecoder(self._model.checkpoint, context=self._model.spec.context_length, weights=outer)
            while len(self._removed) < self._drop:
                self._remove_cheapest(decoder, token_ids, told)
                write_json(state, {"removed": self._removed, "scores": self._scores})
        elif not self._removed:
            values = self._influences(Stream(decoder, token_ids), work, told)
            self._removed = least_influential(values, self._drop)
            self._scores = [*values]
            write_json(state, {"removed": self._removed, "scores": self._scores})
        names = ", ".join(map(str, self._removed))
        return [self._calibration.coverage(), f"removed, counted from 0: {names}"]

    def _influences(self, stream: Stream, work: Path, told: Told) -> list[float]:
        stream.start(work, 0)
        values = []
        for index in range(self._model.num_layers):
            layer, found = stream.layer(index), BlockInfluence()
            out = stream.output(index)
            for part in stream.batches():
                before = stream.read(index, part)
                after = layer.forward(before)
                found.add(before, after)
                out.write(part, after)
            out.close()
            values.append(found.value)
            told(self._weights_of(index), f"influence of layer {index}")
        return values

    def _remove_cheapest(self, decoder: TorchDecoder, token_ids: torch.Tensor, told: Told) -> None:
        """One more layer. Each is in memory once per round: what lacks another one goes through it beside the rest."""
        left = self.sources
        whole = decoder.embed(token_ids)
        without: dict[int, torch.Tensor] = {}
        for index in left:
            layer = decoder.layer(index, token_ids.shape[1])
            for gone, x in without.items():
                without[gone] = _run(layer.forward, x)
                told(self._weights_of(index), f"loss without layer {gone}")
            without[index] = whole
            whole = _run(layer.forward, whole)
        losses = {gone: self._loss(decoder, x, token_ids) for gone, x in without.items()}
        cheapest = min(losses, key=lambda gone: losses[gone])
        self._removed.append(cheapest)
        self._scores.append(losses[cheapest])

    def _loss(self, decoder: TorchDecoder, x: torch.Tensor, token_ids: torch.Tensor) -> float:
        losses = [mean_loss(decoder.final(x[i : i + 1]), token_ids[i : i + 1]) for i in range(len(x))]
        return sum(losses) / len(losses)

    def _weights_of(self, index: int) -> int:
        return sum(module.num_weights for module in self._model.modules(index))

    def layer(self, position: int, told: Told) -> PrunedLayer:
        """As Walk.layer: as it was."""
        index = self.sources[position]
        prefix = f"layers.{index}."
        names = [name for name in self._model.checkpoint.tensors if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): self._model.plain(name) for name in names}
        told(self._weights_of(index), f"layer {index}")
        return PrunedLayer(index, self._model.spec.layers[index], tensors)

    def figures(self, measured: list[Mapping[str, object]]) -> dict[str, object]:
        """As Walk.figures."""
        return {"loss_after_each_removal" if self._by_loss else "influence_of_each_layer": self._scores}

    def scratch(self) -> list[str]:
        """As Walk.scratch."""
        return [_STATE, *Stream.files()]


def _run(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One sequence at a time, which keeps what is in between small."""
    return torch.cat([forward(x[i : i + 1]) for i in range(len(x))])


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else []
