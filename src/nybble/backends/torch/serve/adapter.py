"""LoRA in torch: what the sequences of a step add to the outputs of linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nybble.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Factors:
    """Added to a linear's output: (x @ a.T) @ b.T, with the scale in b. a: [rank, in]; b: [out, rank]."""

    a: torch.Tensor
    b: torch.Tensor


class TorchAdapter:
    """What steps name; `TorchModel.load_adapter` makes it. layers: for each layer its factors by the linear's name."""

    def __init__(self, layers: Mapping[int, Mapping[str, Factors]]) -> None:
        self.layers = layers

    @property
    def memory_bytes(self) -> int:
        """Bytes of the factors."""
        return sum(part.nbytes for layer in self.layers.values() for one in layer.values() for part in (one.a, one.b))


def make_adapter(adapter: Adapter, devices: Sequence[torch.device], dtype: torch.dtype) -> TorchAdapter:
    """Copy an adapter to the devices of the layers.

    Raises:
        CheckpointError: values are not finite.
    """

    def on(device: torch.device, values: npt.NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device, dtype)

    return TorchAdapter(
        {
            index: {one.name: Factors(on(devices[index], one.a), on(devices[index], one.b * one.scale)) for one in many}
            for index, many in adapter.layers()
        }
    )


@dataclass(frozen=True, slots=True)
class LayerAdapters:
    """The factors that a step needs in one layer: runs of tokens [begin, end) and what changes them."""

    runs: tuple[tuple[int, int, Mapping[str, Factors]], ...]

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Change y, the linear's output for x, in place."""
        for begin, end, factors in self.runs:
            one = factors.get(name)
            if one is not None:
                y[begin:end] += (x[begin:end] @ one.a.T) @ one.b.T


class StepAdapters:
    """The adapters of a step. cu_seqlens_q: where each sequence's tokens begin; adapter_of: which one each has."""

    def __init__(
        self, adapters: Sequence[TorchAdapter], cu_seqlens_q: npt.NDArray[np.int32], adapter_of: npt.NDArray[np.int32]
    ) -> None:
        self._runs: list[tuple[int, int, TorchAdapter]] = []
        for place, chosen in enumerate(adapter_of.tolist()):
            if chosen < 0:
                continue
            begin, end = int(cu_seqlens_q[place]), int(cu_seqlens_q[place + 1])
            last = self._runs[-1] if self._runs else None
            if last is not None and last[1] == begin and last[2] is adapters[chosen]:
                self._runs[-1] = (last[0], end, last[2])
            else:
                self._runs.append((begin, end, adapters[chosen]))

    def layer(self, index: int) -> LayerAdapters:
        """What changes in one layer."""
        runs = ((begin, end, adapter.layers.get(index, {})) for begin, end, adapter in self._runs)
        return LayerAdapters(tuple(run for run in runs if run[2]))
