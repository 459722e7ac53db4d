"""SparseGPT's maths on one matrix: weights are removed column by column, and those to come make up for it.

Frantar and Alistarh 2023, arXiv 2301.00774. The factor of H^-1 and its meaning are GPTQ's (`compress.gptq.algorithm`):
setting w_i to zero instead of rounding it is an error like any other. Knows nothing about models or files.
"""

from __future__ import annotations

import torch

from nybble.compress.gptq.algorithm import inverse_factor, output_error
from nybble.compress.prune.masks import NM, lowest_removed, nm_mask, num_pruned

_BLOCK = 128  # columns that are chosen, and whose mutual updates are done, at once
DAMP_PERCENT = 0.01


def sparse_factor(hessian: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """What linears with the same inputs share; as `inverse_factor`."""
    return inverse_factor(hessian, DAMP_PERCENT)


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    factor: torch.Tensor,
    *,
    amount: float = 0.5,
    nm: NM | None = None,
) -> torch.Tensor:
    """weight: float32 [out, in], not changed; hessian: mean of x x^T; factor: `sparse_factor` of it.

    Gives the weights that are left, with zeros at the others. Without `nm` every block of columns loses the same share,
    wherever in the block it hurts least.
    """
    w = weight.clone()
    w[:, hessian.diagonal() <= 0] = 0
    columns = w.shape[1]
    block = _BLOCK if nm is None else max(1, _BLOCK // nm.group) * nm.group
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        inner = factor[begin:end, begin:end]
        steps = inner.diagonal()[:, None]
        part = w[:, begin:end].T.contiguous()  # each column in one piece, as it is read and changed by itself
        mask = torch.ones(part.shape, dtype=torch.bool) if nm else _lowest((part / steps).square().T, amount).T
        errors = torch.zeros_like(part)
        for i in range(end - begin):
            if nm is not None and i % nm.group == 0:  # from what the columns before have made of these
                ahead = slice(i, i + nm.group)
                mask[ahead] = nm_mask((part[ahead] / steps[ahead]).square().T, nm).T
            gone = torch.where(mask[i], 0.0, part[i])
            part[i] -= gone
            errors[i] = gone / steps[i]
            part[i + 1 :] -= torch.outer(inner[i, i + 1 :], errors[i])
        part[~mask] = 0  # exactly, whatever was rounded
        w[:, begin:end] = part.T
        w[:, end:] -= errors.T @ factor[begin:end, end:]
    return w


def _lowest(score: torch.Tensor, amount: float) -> torch.Tensor:
    return lowest_removed(score, num_pruned(amount, score.numel()))


def error_of(weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> float:
    """The share of the outputs' mean square that is lost."""
    whole = output_error(weight, torch.zeros_like(weight), hessian)
    return output_error(weight, pruned, hessian) / whole if whole > 0 else 0.0
