"""What distillation can have without gradients: each layer fitted to the teacher's by least squares, before training.

    min over W of  sum over tokens |h - y - W a|^2 / |h|^2  +  ridge |W - W0|^2

h: what the teacher's layer gives. W0, which becomes W: the weight of `attn.o`, then that of `ffn.down`; a: its input;
y: what the layer gives without it. For `ffn.down` that is exact. For `attn.o` the network behind it is taken for a
constant, which it is not, so its new weight is kept only where the error falls.

Layers are fitted in the order in which they run, each on what those before it now give, so that each makes up for
layers, heads and neurons that were taken out, and for the errors of the others. |h|^2 weighs every token alike: without
it a few tokens whose states are a thousand times as large would decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nybble.backends.torch.layer import Layer
from nybble.backends.torch.trainable import TrainableDecoder, TrainableLayer
from nybble.checkpoint import Checkpoint, Tensor
from nybble.quant.reference import dequantize

_RIDGE = 0.1  # of the mean square of an input
_BATCH = 1024  # tokens
_ROWS = 64


@dataclass(frozen=True, slots=True)
class Fit:
    """Mean square of a layer's error over that of the teacher's states, averaged over layers and tokens.

    Both are on what the layers before have been fitted to give already.
    """

    before: float
    after: float


def counterparts(student: Checkpoint, teacher: Checkpoint) -> tuple[int, ...] | None:
    """For each of the student's layers the teacher's whose output it should have: that before its next layer's.

    None if the student is not the teacher with parts taken out. Pruning leaves embeddings and norms as they are, so
    the first rows of those are compared and every layer is found by its norms.
    """
    if not np.array_equal(_first_rows(student.tensors["embed"]), _first_rows(teacher.tensors["embed"])):
        return None
    ours, theirs = _norms(student), _norms(teacher)
    found = [theirs.index(norms) for norms in ours if norms in theirs]
    if ours == theirs:
        found = list(range(len(theirs)))
    elif len(found) < len(ours) or len(set(theirs)) < len(theirs) or found != sorted(set(found)):
        return None
    return (*(at - 1 for at in found[1:]), len(theirs) - 1)


def _first_rows(tensor: Tensor) -> npt.NDArray[np.float32]:
    if tensor.packed is not None:
        return np.zeros(0, np.float32)
    return dequantize(tensor.format, tensor.data[: _ROWS * tensor.format.row_bytes(tensor.shape[1])])


def _norms(checkpoint: Checkpoint) -> list[bytes]:
    """Of each layer."""
    names = ("attn_norm", "ffn_norm")
    layers = range(len(checkpoint.spec.layers))
    return [b"".join(checkpoint.tensors[f"layers.{i}.{n}"].to_float32().tobytes() for n in names) for i in layers]


@torch.no_grad()
def fit_layers(
    student: TrainableDecoder, teacher: TrainableDecoder, layers: Sequence[int], token_ids: torch.Tensor
) -> Fit:
    """Change `attn.o` and `ffn.down` of every layer of the student.

    layers: of `counterparts`. token_ids: [sequences, tokens]. Both models are in one process and have one hidden size;
    the student has no norms behind its linears.
    """
    ours, theirs = student.embed(token_ids), teacher.embed(token_ids)
    reached = 0
    errors = []
    for layer, counterpart in zip(student.blocks(), layers, strict=True):
        while reached <= counterpart:
            theirs = _through(teacher, teacher.blocks()[reached], theirs)
            reached += 1
        errors.append(_fit(student, layer, ours, theirs))
        ours = _through(student, layer, ours)
    before, after = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    return Fit(before, after)


def _fit(model: TrainableDecoder, module: TrainableLayer, inputs: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """One layer. Gives its mean error before and after."""
    layer = module.layer(model.rope(module.spec.rope, inputs.shape[1], inputs.device))
    out = layer.weights["attn.o"]
    old = out.clone()
    system = _system(layer, "attn.o", inputs, wanted)
    before = system.error
    out.add_(system.solve().T)
    system = _system(layer, "ffn.down", inputs, wanted)
    if not system.error <= before:
        out.copy_(old)
        system = _system(layer, "ffn.down", inputs, wanted)
    change = system.solve()
    layer.weights["ffn.down"].add_(change.T)
    return [before / wanted.numel(), system.error_with(change) / wanted.numel()]


@dataclass(frozen=True, slots=True)
class _System:
    """Normal equations of a linear's change: gram = A'A, across = A'E, where E is the error with the weight as it is.

    A: [tokens, inputs], E: [tokens, outputs], both divided by the sizes of the teacher's states. error: |E|^2.
    """

    gram: torch.Tensor
    across: torch.Tensor
    error: float

    def solve(self) -> torch.Tensor:
        """The change, [inputs, outputs]. Nothing where all inputs are zero."""
        ridge = _RIDGE * float(self.gram.diagonal().mean())
        if not ridge > 0:
            return torch.zeros_like(self.across)
        damped = self.gram.clone()
        damped.diagonal().add_(ridge)
        return torch.cholesky_solve(self.across, torch.linalg.cholesky(damped))

    def error_with(self, change: torch.Tensor) -> float:
        """|E - A change|^2."""
        return self.error - 2 * float((change * self.across).sum()) + float((change * (self.gram @ change)).sum())


def _system(layer: Layer, name: str, inputs: torch.Tensor, wanted: torch.Tensor) -> _System:
    """For `attn.o` or `ffn.down`."""
    weight = layer.weights[name]
    gram = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    across = torch.zeros(weight.shape[1], weight.shape[0], device=weight.device)
    total = 0.0
    for part in _parts(inputs):
        attended = layer.attention_mix(layer.attention_input(inputs[part]))
        x = layer.add_attention(inputs[part], attended)
        mixed = layer.ffn_mix(layer.ffn_input(x))
        target = wanted[part].float()
        scale = target.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
        error = ((target - layer.add_ffn(x, mixed).float()) * scale).flatten(0, 1)
        read = ((attended if name == "attn.o" else mixed).float() * scale).flatten(0, 1)
        with torch.autocast(weight.device.type, enabled=False):
            gram += read.T @ read
            across += read.T @ error
        total += float(error.square().sum())
    return _System(gram, across, total)


def _through(model: TrainableDecoder, module: TrainableLayer, x: torch.Tensor) -> torch.Tensor:
    rope = model.rope(module.spec.rope, x.shape[1], x.device)
    return torch.cat([module(x[part], rope) for part in _parts(x)])


def _parts(x: torch.Tensor) -> Iterator[slice]:
    step = max(1, _BATCH // x.shape[1])
    return (slice(i, i + step) for i in range(0, len(x), step))
