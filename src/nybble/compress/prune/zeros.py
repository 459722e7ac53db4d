"""The pass that sets weights to zero: by magnitude, Wanda or SparseGPT.

The calibrated ones go through a layer as GPTQ does: linears are pruned in the order in which they run, and each reads
what those before it give once they are pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from nybble.backends.torch import TorchDecoder
from nybble.compress.calibration.groups import walk_groups
from nybble.compress.calibration.samples import Calibration, load_calibration
from nybble.compress.calibration.stream import Moments, Stream
from nybble.compress.methods import Progress
from nybble.compress.prune.layers import PrunedLayer
from nybble.compress.prune.masks import GlobalCut, magnitude_mask, nm_mask, row_mask, wanda_score
from nybble.compress.prune.options import PruneOptions
from nybble.compress.prune.sparsegpt import error_of, sparse_factor, sparsegpt
from nybble.compress.safetensors.linear import put, take
from nybble.compress.safetensors.model import FolderModel, Module
from nybble.compress.safetensors.options import DEFAULT_SAMPLES
from nybble.formats.stored import Stored

Told = Callable[[int, str], None]


class Zeros:
    """A `Walk`."""

    passes = 0

    def __init__(self, model: FolderModel, options: PruneOptions) -> None:
        self._model = model
        self._options = options
        if options.pattern is not None:
            for module in model.modules(0):
                options.pattern.check(module.inputs, module.stem)
        self._calibration: Calibration | None = None
        self._stream: Stream | None = None
        self._cut: GlobalCut | None = None

    @property
    def sources(self) -> list[int]:
        """As Walk.sources."""
        return list(range(self._model.num_layers))

    def plan(self, progress: Progress) -> Mapping[str, object]:
        """As Walk.plan."""
        if not self._options.calibrated:
            return {}
        self._calibration = load_calibration(
            self._model.checkpoint, self._options.calibration(DEFAULT_SAMPLES), progress
        )
        return {"calibration": self._calibration.digest}

    def start(self, work: Path, first: int, told: Told) -> list[str]:
        """As Walk.start."""
        if self._calibration is not None:
            decoder = TorchDecoder(self._model.checkpoint, context=self._model.spec.context_length)
            self._stream = Stream(decoder, torch.from_numpy(self._calibration.token_ids))
            self._stream.start(work, first)
            return [self._calibration.coverage("SparseGPT" if self._options.method == "sparsegpt" else None)]
        if self._options.scope == "global":
            assert self._options.amount is not None
            self._cut = GlobalCut.find(self._weights, self._options.amount)
            for index in range(first):  # where an interrupted run had come with weights that are equal to the cut
                for module in self._model.modules(index):
                    _, self._cut = self._cut.apply(torch.from_numpy(self._model.read_module(module)))
        return []

    def _weights(self) -> Iterator[torch.Tensor]:
        for module in self._model.all_modules():
            yield torch.from_numpy(self._model.read_module(module))

    @torch.no_grad()
    def layer(self, position: int, told: Told) -> PrunedLayer:
        """As Walk.layer."""
        modules = self._model.modules(position)
        tensors = {name.split(".", 2)[2]: self._model.plain(name) for name in self._model.layer_vectors(position)}
        figures: dict[str, object] = {}
        if self._stream is None:
            for module in modules:
                weight = torch.from_numpy(self._model.read_module(module).copy())
                self._finish(module, weight * self._magnitude(weight), tensors)
                told(module.num_weights, module.stem)
            return PrunedLayer(position, self._model.spec.layers[position], tensors, figures)
        layer = self._stream.layer(position)

        def prune(group: int, moments: Moments) -> None:
            chosen = [module for module in modules if module.group == group]
            hessian = moments.hessian(chosen[0].stem)
            factor = sparse_factor(hessian)[0] if self._options.method == "sparsegpt" else None
            for module in chosen:
                weight = take(layer.weights, module)
                pruned = self._calibrated(weight, hessian, factor)
                if hessian.ndim == 2:
                    figures[module.stem] = error_of(weight, pruned, hessian)
                put(layer.weights, module, pruned)
                self._finish(module, pruned, tensors)
                told(module.num_weights, module.stem)

        walk_groups(self._stream, position, layer, prune, full=self._options.method == "sparsegpt")
        return PrunedLayer(position, self._model.spec.layers[position], tensors, figures)

    def _magnitude(self, weight: torch.Tensor) -> torch.Tensor:
        options = self._options
        if options.pattern is not None:
            return nm_mask(weight.abs(), options.pattern)
        assert options.amount is not None
        if self._cut is None:
            return magnitude_mask(weight, options.amount)
        mask, self._cut = self._cut.apply(weight)
        return mask

    def _calibrated(self, weight: torch.Tensor, hessian: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
        """hessian: its diagonal alone for Wanda."""
        options = self._options
        if factor is not None:
            return sparsegpt(weight, hessian, factor, amount=options.amount or 0.0, nm=options.pattern)
        score = wanda_score(weight, hessian if hessian.ndim == 1 else hessian.diagonal())
        mask = row_mask(score, options.amount or 0.0) if options.pattern is None else nm_mask(score, options.pattern)
        return weight * mask

    def _finish(self, module: Module, weight: torch.Tensor, tensors: dict[str, Stored]) -> None:
        for part, rows in zip(module.parts, torch.split(weight, list(module.rows)), strict=True):
            tensors[part] = self._model.plain(f"layers.{module.layer}.{part}", np.ascontiguousarray(rows.numpy()))

    def figures(self, measured: list[Mapping[str, object]]) -> dict[str, object]:
        """As Walk.figures."""
        errors = [float(str(value)) for one in measured for value in one.values()]
        return {"mean_output_error": sum(errors) / len(errors)} if errors else {}

    def scratch(self) -> list[str]:
        """As Walk.scratch."""
        return Stream.files()
