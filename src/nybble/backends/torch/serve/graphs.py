"""Decode steps replayed as CUDA graphs: one launch instead of hundreds, for batches padded to a few sizes.

What is captured reads from buffers that stay where they are. The embedding is looked up outside: it may live on the
host. Nothing here needs CUDA but `CudaCapture`, so the padding is tested with a capture that only calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nybble.backends.torch.serve.inputs import HostInputs, StepTensors, padded, step_tensors

# Gets what to capture; gives what runs it again, on what the buffers hold by then.
Capture = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
# From hidden states that enter the layers to logits, for one token of each sequence.
Run = Callable[[torch.Tensor, StepTensors], torch.Tensor]

LARGEST = 512


def sizes_up_to(largest: int) -> list[int]:
    """Batch sizes that are captured: 1, 2, 4, then multiples of 8, and from 256 on of 32."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, LARGEST + 1, 32)]
    return [size for size in sizes if size <= largest]


class GraphRunner:
    """Replays steps of one token per sequence. table_width: blocks of the longest sequence.

    embed: token ids on the device -> [tokens, hidden_size]. run: the rest of the decoder.
    """

    def __init__(
        self,
        *,
        embed: Callable[[torch.Tensor], torch.Tensor],
        run: Run,
        capture: Capture,
        device: torch.device,
        table_width: int,
        largest: int = LARGEST,
    ) -> None:
        self._embed = embed
        self._run = run
        self._capture = capture
        self._device = device
        self._table_width = table_width
        self._sizes = sizes_up_to(largest)
        self._graphs: dict[int, tuple[StepTensors, torch.Tensor, Callable[[], torch.Tensor]]] = {}

    def size_for(self, host: HostInputs) -> int | None:
        """The size that a step is padded to; None if it is no decode step, or too large."""
        if not host.is_decode:
            return None
        count = len(host.kv_lens)
        return next((size for size in self._sizes if size >= count), None)

    def logits(self, host: HostInputs, size: int) -> torch.Tensor:
        """[sequences, vocab_size] of a step for which size_for gave `size`."""
        count = len(host.kv_lens)
        fresh = step_tensors(padded(host, size, self._table_width), self._device)
        x = self._embed(fresh.token_ids)
        if size not in self._graphs:
            self._graphs[size] = self._make(fresh, x)
        buffers, entering, replay = self._graphs[size]
        for name in ("positions", "slots", "kv_lens", "block_tables"):
            getattr(buffers, name).copy_(getattr(fresh, name))
        entering.copy_(x)
        return replay()[:count].clone()

    def forget(self) -> None:
        """Let go of all graphs: what they read is gone, a cache that is replaced for example."""
        self._graphs.clear()

    def _make(
        self, fresh: StepTensors, x: torch.Tensor
    ) -> tuple[StepTensors, torch.Tensor, Callable[[], torch.Tensor]]:
        """Buffers that hold this step, and the graph over them. Capturing runs it, which a replay then repeats."""
        entering = x.clone()
        return fresh, entering, self._capture(lambda: self._run(entering, fresh))


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
