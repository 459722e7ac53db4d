"""One process's part of a model: its decoder and its cache. What it computes follows from a step alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nybble.backends.torch.serve.adapter import StepAdapters
from nybble.backends.torch.serve.cache import PagedCache, layer_block_bytes
from nybble.backends.torch.serve.decoder import Decoder
from nybble.backends.torch.serve.graphs import CudaCapture, GraphRunner
from nybble.backends.torch.serve.inputs import BLOCK_SIZE, HostInputs, StepTensors, step_tensors


@dataclass(frozen=True, slots=True)
class Output:
    """logits: float32 [logit_rows, vocab_size]; hidden: final-normed [hidden_rows, hidden_size]."""

    logits: torch.Tensor
    hidden: torch.Tensor


class Rank:
    """kind: of keys and values. graphs: whether decode steps are recorded and replayed."""

    def __init__(self, decoder: Decoder, *, context: int, kind: torch.dtype, graphs: bool) -> None:
        self.decoder = decoder
        self.context = context
        self.cache: PagedCache | None = None
        self._kind = kind
        self._graphs = self._runner() if graphs else None

    @property
    def block_bytes(self) -> int:
        """Bytes of the keys and values of one block, in all layers of this part."""
        return sum(layer_block_bytes(layer, self._kind) for layer in self.decoder.spec.layers)

    def bytes_per_block_on(self, kind: str) -> int:
        """Of the layers on devices of this kind, "cuda" or "cpu"."""
        places = zip(self.decoder.spec.layers, self.decoder.devices, strict=True)
        return sum(layer_block_bytes(layer, self._kind) for layer, device in places if device.type == kind)

    def new_cache(self, num_blocks: int) -> None:
        """Raises ConfigError if there is no memory for it."""
        self.cache = None
        if self._graphs is not None:
            self._graphs.forget()
        self.cache = PagedCache(self.decoder.spec.layers, self.decoder.devices, num_blocks, self._kind)

    def drop_cache(self) -> None:
        """Give its memory back."""
        self.cache = None

    def needed_cache(self) -> PagedCache:
        if self.cache is None:
            raise ValueError("the model has no cache: call new_cache first")
        return self.cache

    @torch.inference_mode()
    def run(self, host: HostInputs, adapters: StepAdapters | None = None, *, eager: bool = False) -> Output:
        """Run a step on this part; with others, each of them runs the same one. eager: without a graph."""
        cache, decoder = self.needed_cache(), self.decoder
        recorded = self._graphs if adapters is None and not eager else None
        size = None if recorded is None else recorded.size_for(host)
        if recorded is not None and size is not None:
            logits = recorded.logits(host, size)
            return Output(logits, logits.new_zeros((0, decoder.spec.hidden_size)))
        step = step_tensors(host, decoder.device)
        states = decoder.forward(decoder.embed(step.token_ids), step, cache, adapters)
        return Output(decoder.logits(states[step.logit_rows]), states[step.hidden_rows])

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What follows from final-normed hidden states."""
        return self.decoder.logits(hidden.to(self.decoder.device, self.decoder.dtype))

    def _runner(self) -> GraphRunner:
        decoder = self.decoder

        def run(step: StepTensors) -> torch.Tensor:
            return decoder.logits(decoder.forward(decoder.embed(step.token_ids), step, self.needed_cache()))

        return GraphRunner(
            run=run,
            capture=CudaCapture(),
            device=decoder.device,
            table_width=-(-self.context // BLOCK_SIZE),
        )
