"""The residual stream of all calibration samples between two layers, and what the linears of a layer read.

The stream lies in files, one for even layers and one for odd: memory holds a batch, and after an interruption the input
of the first unfinished layer is still there.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nybble.backends.torch import Layer, TorchDecoder
from nybble.core.errors import CheckpointError, OutputError
from nybble.core.spec import ModelSpec

_BATCH_TOKENS = 4096
BAND = 1024  # rows of a symmetric matrix that are computed together
_FILES = ("hidden-0.bin", "hidden-1.bin", "hidden-2.bin")


@dataclass(slots=True)
class Moments:
    """Of all inputs [tokens, in] that a group of linears reads: sums of x x^T, of |x| and of x.

    full: the whole matrix, not only its diagonal.
    """

    squares: torch.Tensor  # of the whole matrix only what `hessian` does not mirror is filled
    absolute: torch.Tensor
    signed: torch.Tensor
    full: bool
    count: int = 0

    @classmethod
    def zeros(cls, inputs: int, *, full: bool) -> Moments:
        shape = (inputs, inputs) if full else (inputs,)
        return cls(torch.zeros(shape), torch.zeros(inputs), torch.zeros(inputs), full)

    def add(self, x: torch.Tensor) -> None:
        """x: [..., in]."""
        flat = x.reshape(-1, x.shape[-1])
        if self.full:
            for begin, end in _bands(flat.shape[1]):  # what lies left of the diagonal is its mirror image
                self.squares[begin:end, begin:].addmm_(flat[:, begin:end].T, flat[:, begin:])
        else:
            self.squares += flat.square().sum(0)
        self.absolute += flat.abs().sum(0)
        self.signed += flat.sum(0)
        self.count += len(flat)

    def hessian(self, name: str) -> torch.Tensor:
        """The mean of x x^T. Raises CheckpointError that names the linear if an input was not finite."""
        if not bool(torch.isfinite(self.absolute).all()) or not bool(torch.isfinite(self.squares).all()):
            raise CheckpointError(
                f"what {name} reads on the calibration text is not a number any more: the model computes infinities, "
                "check it before it is quantised"
            )
        mean = self.squares / max(1, self.count)
        if self.full:
            for begin, end in _bands(len(mean)):
                mean[end:, begin:end] = mean[begin:end, end:].T
        return mean

    def importance(self, name: str) -> torch.Tensor:
        """[in]: the mean of x^2. Raises as `hessian`."""
        mean = self.hessian(name)
        return mean.diagonal().clone() if self.full else mean

    def mean_abs(self) -> torch.Tensor:
        return self.absolute / max(1, self.count)

    def mean(self) -> torch.Tensor:
        return self.signed / max(1, self.count)


def _bands(size: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a symmetric matrix that are computed together, from the diagonal on."""
    for begin in range(0, size, BAND):
        yield begin, min(begin + BAND, size)


def quiet_inputs(importance: torch.Tensor) -> int:
    """Inputs that hardly carried anything: a ten-thousandth of the mean, in size."""
    return int((importance < importance.mean() * 1e-8).sum())


def batch_bytes(spec: ModelSpec, num_tokens: int) -> int:
    """What a batch of samples of so many tokens takes on its way through a layer, about, or the embedding before."""
    batch = max(1, _BATCH_TOKENS // num_tokens) * num_tokens
    widest = 0
    for layer in spec.layers:
        heads = (layer.num_q_heads + layer.num_kv_heads) * layer.head_dim
        width = 4 * spec.hidden_size + 2 * heads + layer.num_q_heads * num_tokens
        widest = max(widest, width, 4 * spec.hidden_size + 3 * layer.ffn_size)
    return 4 * max(batch * widest, spec.vocab_size * spec.hidden_size)


class Stream:
    """token_ids: [samples, tokens]."""

    def __init__(self, decoder: TorchDecoder, token_ids: torch.Tensor) -> None:
        self.decoder = decoder
        self.token_ids = token_ids
        self._work = Path()
        self._per_batch = max(1, _BATCH_TOKENS // token_ids.shape[1])

    @staticmethod
    def files() -> list[str]:
        """Names of what lies in the working folder."""
        return list(_FILES)

    def start(self, work: Path, first_layer: int) -> None:
        """Make the input of the first layer, or find that of the layer to go on with. Raises OutputError."""
        self._work = work
        if first_layer:
            if not (work / _FILES[first_layer % 2]).exists():
                raise OutputError(f"{work} lacks the input of layer {first_layer}: remove it and start again")
            return
        out, table = Buffer(self._map(0, "w+")), self.decoder.weight("embed")
        for part in self.batches():
            out.write(part, self.decoder.embed(self.token_ids[part], table))
        out.close()

    def batches(self) -> Iterator[slice]:
        """Slices of samples."""
        for begin in range(0, len(self.token_ids), self._per_batch):
            yield slice(begin, min(begin + self._per_batch, len(self.token_ids)))

    def layer(self, index: int) -> Layer:
        return self.decoder.layer(index, self.token_ids.shape[1])

    def read(self, index: int, part: slice) -> torch.Tensor:
        """The input of a layer: [batch, tokens, hidden_size]."""
        return torch.from_numpy(np.array(self._map(index % 2, "r")[part]))

    def output(self, index: int) -> Buffer:
        """Where the output of a layer goes."""
        return Buffer(self._map((index + 1) % 2, "w+"))

    def buffer(self, width: int) -> Buffer:
        """A place for something else of every token."""
        return Buffer(self._map(2, "w+", width))

    def collect(self, index: int, layer: Layer, *, full: bool) -> list[Moments]:
        """Run a layer and give the moments of what its four groups of linears read."""
        found: dict[int, Moments] = {}

        def observe(names: tuple[str, ...], x: torch.Tensor) -> None:
            group = _GROUP_OF[names[0]]
            if group not in found:
                found[group] = Moments.zeros(x.shape[-1], full=full)
            found[group].add(x)

        for part in self.batches():
            layer.forward(self.read(index, part), observe)
        return [found[group] for group in sorted(found)]

    def advance(self, index: int, layer: Layer) -> None:
        """Run a layer, as it has become, for the input of the next one."""
        out = self.output(index)
        for part in self.batches():
            out.write(part, layer.forward(self.read(index, part)))
        out.close()

    def _map(self, which: int, mode: str, width: int | None = None) -> np.memmap:
        shape = (*self.token_ids.shape, width or self.decoder.spec.hidden_size)
        path = self._work / _FILES[which]
        try:
            if mode == "w+":  # takes the room at once: a write into a mapping of a full disk would end the process
                with path.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
            return np.memmap(path, np.float32, "r" if mode == "r" else "r+", shape=shape)
        except OSError as e:
            what = "there is no room on the disk" if e.errno == errno.ENOSPC else e.strerror or e
            raise OutputError(f"{path} cannot be written: {what}") from e


_GROUP_OF = {"attn.q": 0, "attn.o": 1, "ffn.gate": 2, "ffn.down": 3}


class Buffer:
    """Values of every token, in a file."""

    def __init__(self, values: np.memmap) -> None:
        self._values = values

    def read(self, part: slice) -> torch.Tensor:
        return torch.from_numpy(np.array(self._values[part]))

    def write(self, part: slice, values: torch.Tensor) -> None:
        self._values[part] = values.numpy()

    def close(self) -> None:
        """On the disk."""
        self._values.flush()
