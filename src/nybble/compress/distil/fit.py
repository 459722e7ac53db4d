"""What distillation can have without gradients: each layer fitted to the teacher's by least squares, before training.

    min over D of  sum over tokens |h - x - D a|^2 / |h|^2  +  ridge |D - D0|^2

h: what the teacher's layer gives; x: the student's residual stream after attention; a: the input of `ffn.down`, whose
weight D0 becomes D. Layers are fitted in the order in which they run, each on what those before it now give, so that
each makes up for layers and neurons that were taken out, and for the errors of the others. |h|^2 weighs every token
alike: without it a few tokens whose states are a thousand times as large would decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

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
    """Change `ffn.down` of every layer of the student. layers: of `counterparts`. token_ids: [sequences, tokens].

    Both models are in one process and have one hidden size; the student has no norms behind its linears.
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
    down = layer.weights["ffn.down"]
    gram = torch.zeros(down.shape[1], down.shape[1], device=down.device)
    across = torch.zeros(down.shape[1], down.shape[0], device=down.device)
    before = 0.0
    for part in _parts(inputs):
        x = inputs[part]
        x = layer.add_attention(x, layer.attention_mix(layer.attention_input(x)))
        mixed = layer.ffn_mix(layer.ffn_input(x))
        target = wanted[part].float()
        scale = target.square().mean(-1, keepdim=True).clamp(min=1e-12).rsqrt()
        error = ((target - layer.add_ffn(x, mixed).float()) * scale).flatten(0, 1)
        mixed = (mixed.float() * scale).flatten(0, 1)
        with torch.autocast(down.device.type, enabled=False):
            gram += mixed.T @ mixed
            across += mixed.T @ error
        before += float(error.square().sum())
    ridge = _RIDGE * float(gram.diagonal().mean())
    if not ridge > 0:
        return [before / wanted.numel()] * 2
    damped = gram.clone()
    damped.diagonal().add_(ridge)
    change = torch.cholesky_solve(across, torch.linalg.cholesky(damped))
    after = before - 2 * float((change * across).sum()) + float((change * (gram @ change)).sum())
    down.add_(change.T)
    return [before / wanted.numel(), after / wanted.numel()]


def _through(model: TrainableDecoder, module: TrainableLayer, x: torch.Tensor) -> torch.Tensor:
    rope = model.rope(module.spec.rope, x.shape[1], x.device)
    return torch.cat([module(x[part], rope) for part in _parts(x)])


def _parts(x: torch.Tensor) -> Iterator[slice]:
    step = max(1, _BATCH // x.shape[1])
    return (slice(i, i + step) for i in range(0, len(x), step))
