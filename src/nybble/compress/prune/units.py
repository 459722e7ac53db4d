"""Which inputs of a linear are taken out together (a neuron, a head), and how the rest makes up for them.

A unit is a run of inputs of `down` or `o`: taking it out of them lets the rows go that compute it. Knows nothing about
models or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_DAMP_PERCENT = 0.01
_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Inputs:
    """Of all inputs x of a linear: the mean of x x^T [in, in], and of x [in]."""

    hessian: torch.Tensor
    mean: torch.Tensor


@dataclass(frozen=True, slots=True)
class Fitted:
    """What is left of a linear: its weight [out, kept], and what is added to its outputs, if that may be."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def channels(units: torch.Tensor, size: int) -> torch.Tensor:
    """The inputs of units, in ascending order."""
    return (units[:, None] * size + torch.arange(size)).reshape(-1)


def activation_score(weight: torch.Tensor, inputs: Inputs, size: int) -> torch.Tensor:
    """[units]: the mean square of what each adds to the outputs, as if its inputs were independent."""
    energy = inputs.hessian.diagonal().clamp(min=0) * weight.square().sum(0)
    return energy.reshape(-1, size).sum(1)


def fluctuation_score(weight: torch.Tensor, inputs: Inputs, size: int) -> torch.Tensor:
    """As `activation_score` around the mean, which a bias can hold. FLAP: An et al. 2023, arXiv 2312.11983."""
    variance = (inputs.hessian.diagonal() - inputs.mean.square()).clamp(min=0)
    return (variance * weight.square().sum(0)).reshape(-1, size).sum(1)


def removal_score(weight: torch.Tensor, hessian: torch.Tensor, size: int) -> torch.Tensor:
    """[units]: the mean square error of the outputs if one is taken out and all others make up for it.

    Hassibi and Stork 1992 (optimal brain surgeon), for runs of inputs: w_u ([H^-1]_uu)^-1 w_u, summed over outputs.
    """
    inverse = torch.cholesky_inverse(_factor(hessian))
    count = weight.shape[1] // size
    index = torch.arange(count)
    blocks = inverse.reshape(count, size, count, size)[index, :, index, :]
    parts = weight.reshape(-1, count, size).permute(1, 2, 0)
    solved: torch.Tensor = torch.linalg.solve(blocks, parts)
    return (parts * solved).sum((1, 2))


def keep_best(score: torch.Tensor, num_keep: int, num_groups: int = 1) -> torch.Tensor:
    """The units to keep, ascending: `num_keep` in all, the same number of each of `num_groups` runs of units."""
    grouped = score.reshape(num_groups, -1)
    best = torch.argsort(grouped, dim=1, descending=True, stable=True)[:, : num_keep // num_groups]
    return (best.sort(dim=1).values + torch.arange(num_groups)[:, None] * grouped.shape[1]).reshape(-1)


def choose(
    weight: torch.Tensor, inputs: Inputs, size: int, num_keep: int, *, num_groups: int = 1, rounds: int = _ROUNDS
) -> torch.Tensor:
    """The units to keep when the rest will be refitted, ascending.

    Units go in a few rounds, and after each the rest is refitted and judged again: two that can stand in for each other
    are not both taken out.
    """
    kept = torch.arange(weight.shape[1] // size)
    surplus = (len(kept) - num_keep) // num_groups  # of each group
    rounds = max(1, min(rounds, surplus))
    for done in range(rounds):
        part = channels(kept, size)
        current = refit(weight, inputs, part).weight
        score = removal_score(current, inputs.hessian[part][:, part], size)
        left = num_keep + num_groups * (surplus * (rounds - 1 - done) // rounds)
        kept = kept[keep_best(score, left, num_groups)]
    return kept


def refit(weight: torch.Tensor, inputs: Inputs, kept: torch.Tensor, *, with_bias: bool = False) -> Fitted:
    """The least-squares fit of all outputs from the inputs that are kept. kept: inputs, ascending.

    W' = W_K + W_R H_RK (H_KK + d)^-1: what the removed inputs gave is expressed by the others as far as they can. With
    a bias, covariances take the place of H, and the bias holds what the removed ones gave on average.
    """
    mask = torch.ones(weight.shape[1], dtype=torch.bool)
    mask[kept] = False
    gone = torch.nonzero(mask).reshape(-1)
    stays, leaves = weight[:, kept], weight[:, gone]
    if not len(gone):
        return Fitted(stays, torch.zeros(len(weight)) if with_bias else None)
    moments = inputs.hessian
    if with_bias:
        moments = moments - torch.outer(inputs.mean, inputs.mean)
    across = leaves @ moments[gone][:, kept]
    change = torch.cholesky_solve(across.T, _factor(moments[kept][:, kept])).T
    bias = leaves @ inputs.mean[gone] - change @ inputs.mean[kept] if with_bias else None
    return Fitted(stays + change, bias)


def without(weight: torch.Tensor, inputs: Inputs, kept: torch.Tensor, *, with_bias: bool = False) -> Fitted:
    """The weights of the inputs that are kept as they are; the bias holds what the others gave on average."""
    mask = torch.ones(weight.shape[1], dtype=torch.bool)
    mask[kept] = False
    return Fitted(weight[:, kept].clone(), weight[:, mask] @ inputs.mean[mask] if with_bias else None)


def _factor(moments: torch.Tensor) -> torch.Tensor:
    """The lower Cholesky factor, damped by a share of the mean square, more if it has to be."""
    mean = float(moments.diagonal().mean()) or 1.0
    damp = _DAMP_PERCENT
    while True:
        damped = moments.double()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            found: torch.Tensor = lower.float()
            return found
        damp *= 10
