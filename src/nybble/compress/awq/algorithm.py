"""AWQ's maths on linears that read one input: a scale per input before rounding, and how far to clip each group.

Both are searched for the smallest error of the outputs over all calibration tokens, which follows from H, the mean of
x x^T: with D = W - Q the error is trace(D H D^T). (AutoAWQ measures attention and feed-forward blocks on a few hundred
tokens instead.) Knows nothing about models or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nybble.compress.gptq.algorithm import output_error
from nybble.compress.grids import Grid, round_to_nearest

STEPS = 20  # exponents tried
ROWS = 256  # on which scales are tried: all rows see the same inputs, and a ranking of scales needs no more
_FLOOR = 1e-4
_CLIP_STEPS = 10  # of 1/20 each: down to half of the range


@dataclass(frozen=True, slots=True)
class Scaling:
    """scale: [in]; error and rtn_error: of the outputs it was tried on, with it and without."""

    scale: torch.Tensor
    error: float
    rtn_error: float


def search_scale(
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    mean_abs: torch.Tensor,
    grid: Grid,
    *,
    share: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Scaling:
    """The scale per input under which rounding `weights` costs least, or some of their rows, evenly spread.

    mean_abs: [in], the mean absolute value of each input. share: makes the scales equal for inputs that must have the
    same one (of query heads that share a value head).
    """
    joined = torch.cat(list(weights))
    some = joined[:: -(-len(joined) // ROWS)]
    importance = hessian.diagonal().clamp(min=0)
    rtn_error = _error(some, torch.ones_like(mean_abs), hessian, importance, grid)
    best = Scaling(torch.ones_like(mean_abs), rtn_error, rtn_error)
    if not float(mean_abs.sum()) > 0:
        return best
    x_mean, w_mean = mean_abs, _weight_mean(joined, grid)
    for duo in (True, False):
        for step in range(STEPS):
            ratio = step / STEPS
            scale = x_mean.clamp(min=_FLOOR).pow(ratio)
            if duo:
                scale = scale / (w_mean.pow(1 - ratio) + _FLOOR)
            scale = scale.clamp(min=_FLOOR)
            if share is not None:
                scale = share(scale)
            scale = scale / (scale.max() * scale.min()).sqrt()
            if not bool(torch.isfinite(scale).all()):
                continue
            error = _error(some, scale, hessian, importance, grid)
            if error < best.error:
                best = Scaling(scale, error, rtn_error)
    return best


def search_clip(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The weight with the largest values of each group clipped as far as makes its share of the error smallest."""
    rows, inputs = weight.shape
    size = grid.size(inputs)
    groups = weight.reshape(rows, inputs // size, size)
    count = inputs // size
    blocks = hessian.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    limit = groups.abs().amax(-1, keepdim=True)
    best, least = groups, torch.full((rows, count), torch.inf)
    for step in range(_CLIP_STEPS + 1):
        bound = limit * (1 - step / (2 * _CLIP_STEPS))
        clipped = torch.minimum(torch.maximum(groups, -bound), bound)
        codes, params = round_to_nearest(clipped.reshape(rows, inputs), grid)
        difference = params.decode(codes.reshape(rows, count, size).float()) - groups
        error = (torch.einsum("rgi,gij->rgj", difference, blocks) * difference).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better[..., None], clipped, best)
    return best.reshape(rows, inputs)


def _error(
    weight: torch.Tensor, scale: torch.Tensor, hessian: torch.Tensor, importance: torch.Tensor, grid: Grid
) -> float:
    rounded = dequantised(weight * scale, grid, importance / scale.square()) / scale
    return output_error(weight, rounded, hessian)


def dequantised(weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> torch.Tensor:
    """What rounding to the grid makes of a weight."""
    rows, inputs = weight.shape
    codes, params = round_to_nearest(weight, grid, importance)
    size = grid.size(inputs)
    return params.decode(codes.reshape(rows, inputs // size, size).float()).reshape(rows, inputs)


def _weight_mean(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[in]: the mean over outputs of each weight's share of the largest in its group."""
    rows, inputs = weight.shape
    size = grid.size(inputs)
    groups = weight.abs().reshape(rows, inputs // size, size)
    return (groups / (groups.amax(-1, keepdim=True) + 1e-6)).reshape(rows, inputs).mean(0)
