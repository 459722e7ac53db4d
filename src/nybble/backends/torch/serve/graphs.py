"""Decode steps replayed as CUDA graphs: one launch instead of hundreds, for batches padded to a few sizes.

What is captured reads a step from buffers that stay where they are, which one copy fills. Nothing here needs CUDA but
`CudaCapture`, so the padding is tested with a capture that only calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nybble.backends.torch.serve.inputs import HostInputs, StepTensors, layout, padded, step_views, to_flat

# Gets what to capture; gives what runs it again, on what the buffers hold by then.
Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
# The logits of a step with one token of each sequence.
Run = Callable[[StepTensors], torch.Tensor]

LARGEST = 512


def sizes_up_to(largest: int) -> list[int]:
    """Batch sizes that are captured: 1, 2, 4, then multiples of 8, and from 256 on of 32."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, LARGEST + 1, 32)]
    return [size for size in sizes if size <= largest]


@dataclass(frozen=True, slots=True)
class _Graph:
    """staging: a step in its flat form on the host; flat: on the device, where the graph reads it."""

    staging: torch.Tensor
    flat: torch.Tensor
    replay: Callable[[], torch.Tensor]


class GraphRunner:
    """Replays steps of one token per sequence. table_width: blocks of the longest sequence."""

    def __init__(
        self, *, run: Run, capture: Capture, device: torch.device, table_width: int, largest: int = LARGEST
    ) -> None:
        self._run = run
        self._capture = capture
        self._device = device
        self._table_width = table_width
        self._sizes = sizes_up_to(largest)
        self._graphs: dict[int, _Graph] = {}

    @property
    def captured(self) -> tuple[int, ...]:
        """The sizes that have been recorded."""
        return tuple(self._graphs)

    def size_for(self, host: HostInputs) -> int | None:
        """The size that a step is padded to; None if it is no decode step, or too large."""
        if not host.is_decode:
            return None
        count = len(host.kv_lens)
        return next((size for size in self._sizes if size >= count), None)

    def logits(self, host: HostInputs, size: int) -> torch.Tensor:
        """[sequences, vocab_size] of a step for which size_for gave `size`."""
        step = padded(host, size, self._table_width)
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._graphs[size] = self._make(step)
        to_flat(step, graph.staging.numpy())
        graph.flat.copy_(graph.staging, non_blocking=True)  # read before the step ends, and it is waited for
        return graph.replay()[: len(host.kv_lens)].clone()

    def forget(self) -> None:
        """Let go of all graphs: what they read is gone, a cache that is replaced for example."""
        self._graphs.clear()

    def _make(self, step: HostInputs) -> _Graph:
        """Buffers that hold this step, and the graph over them. Capturing runs it, which a replay then repeats."""
        pinned = self._device.type == "cuda"
        staging = torch.zeros(layout(step.header)[-1][1], dtype=torch.int32, pin_memory=pinned)
        to_flat(step, staging.numpy())
        flat = staging.to(self._device, copy=True)
        tensors = step_views(step, flat)
        return _Graph(staging, flat, self._capture(lambda: self._run(tensors)))


class CudaCapture:
    """Records what a function launches. All graphs share their memory: they run one after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Run a function twice, so that kernels are compiled and tuned, then record it."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = function()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay
