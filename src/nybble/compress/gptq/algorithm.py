"""GPTQ's maths on one matrix: columns are rounded one after the other, and each error is spread over those to come.

Minimises ||(W - Q) X||^2 given H = X X^T: with U the upper Cholesky factor of H^-1, rounding column i by e changes
every later column j by -e U_ij / U_ii. Knows nothing about models or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from nybble.compress.grids import Grid, GroupParams, find_params, round_to_nearest

_BLOCK = 128  # columns whose mutual updates are done at once
_TRIANGLE = 256  # inputs of a triangular matrix that is inverted in one piece
_MAX_TRIES = 12
_GROWTH = 2.0


class Order(Enum):
    """In which order columns are rounded.

    NATURAL: as they lie. GROUPS: inside each group and among groups by importance, so that no reader needs to know
    (group-aware reordering). STATIC: by importance, with scales of the groups as they lie, found beforehand. FULL: by
    importance, with groups of neighbours in that order, which readers follow by g_idx.
    """

    NATURAL = "natural"
    GROUPS = "groups"
    STATIC = "static"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """damp_percent: of the mean of H's diagonal, added to the diagonal; grows until H can be inverted."""

    grid: Grid
    order: Order = Order.GROUPS
    damp_percent: float = 0.25


@dataclass(frozen=True, slots=True)
class GptqResult:
    """codes: uint8 [out, in] and params [out, groups] of the matrix as it lies; g_idx: None if groups lie in order.

    error, rtn_error: trace((W - Q) H (W - Q)^T) of this rounding and of round-to-nearest on the same kind of grid.
    fallback: H could not be inverted, or round-to-nearest was better: it was used.
    """

    codes: torch.Tensor
    params: GroupParams
    g_idx: torch.Tensor | None
    error: float
    rtn_error: float
    damp_percent: float
    fallback: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """What linears that read the same inputs share: the order of columns and the factor of H^-1 in that order.

    factor: None if H could not be inverted. damp_percent: what it took.
    """

    hessian: torch.Tensor
    importance: torch.Tensor | None
    order: torch.Tensor | None
    factor: torch.Tensor | None
    damp_percent: float


def prepare(hessian: torch.Tensor, options: GptqOptions) -> Prepared:
    """hessian: float32 [in, in], the mean of x x^T over the inputs; not changed."""
    diagonal = hessian.diagonal().clamp(min=0)
    size = options.grid.size(len(diagonal))
    importance = diagonal if float(diagonal.sum()) > 0 else None
    order = column_order(diagonal, size, options.order)
    ordered = hessian if order is None else hessian[order][:, order]
    factor, damp = inverse_factor(ordered, options.damp_percent)
    return Prepared(hessian, importance, order, factor, damp)


def gptq(weight: torch.Tensor, shared: Prepared, options: GptqOptions) -> GptqResult:
    """weight: float32 [out, in], not changed."""
    inputs = weight.shape[1]
    groups = torch.arange(inputs) // options.grid.size(inputs)
    codes, params = round_to_nearest(weight, options.grid, shared.importance)
    rtn_error = output_error(weight, _decode(codes, params, groups), shared.hessian)
    fallback = GptqResult(codes, params, None, rtn_error, rtn_error, shared.damp_percent, True)
    if shared.factor is None:
        return fallback
    rounded, found, g_idx = _round(weight, shared.factor, shared.importance, shared.order, options, params)
    error = output_error(weight, _decode(rounded, found, groups if g_idx is None else g_idx), shared.hessian)
    if not error <= rtn_error:
        return fallback
    return GptqResult(rounded, found, g_idx, error, rtn_error, shared.damp_percent, False)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """The mean square of the error of the outputs, summed over them."""
    difference = weight - rounded
    return float(((difference @ hessian) * difference).sum())


def column_order(importance: torch.Tensor, size: int, order: Order) -> torch.Tensor | None:
    """The columns in the order in which they are rounded; None: as they lie."""
    if order is Order.NATURAL:
        return None
    if order is not Order.GROUPS:
        return torch.argsort(importance, descending=True, stable=True)
    groups = importance.reshape(-1, size)
    inner = torch.argsort(groups, dim=1, descending=True, stable=True)
    outer = torch.argsort(groups.amax(dim=1), descending=True, stable=True)
    return (inner + torch.arange(len(groups))[:, None] * size)[outer].reshape(-1)


def inverse_factor(hessian: torch.Tensor, damp_percent: float) -> tuple[torch.Tensor | None, float]:
    """The upper Cholesky factor of the damped inverse, and the damping that it took; None if there is none.

    In single precision, then in double, then with more damping. Inputs that were never seen count as independent.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        return None, damp_percent
    dead = diagonal <= 0
    damp = damp_percent
    for _ in range(_MAX_TRIES):
        for dtype in (torch.float32, torch.float64):
            damped = hessian.to(dtype).flip(0, 1)
            damped.diagonal().add_(damp * mean + dead.flip(0).to(dtype) * mean)
            factor, failed = torch.linalg.cholesky_ex(damped)
            del damped  # not more than two at a time: each may be half a gigabyte
            if int(failed):
                continue
            # Turned back, the factor is upper and H = R R^T: the factor of H^-1 = R^-T R^-1 is R^-1.
            factor = factor.flip(0, 1)
            upper = _inverse_of_upper(factor)
            if bool(torch.isfinite(upper).all()):
                return upper.float(), damp
        damp = max(damp * _GROWTH, 1e-3)
    return None, damp


def _inverse_of_upper(matrix: torch.Tensor) -> torch.Tensor:
    """Of an upper triangular matrix, by halves, so that nearly all of the work is products of large matrices."""
    size = len(matrix)
    if size <= _TRIANGLE:
        small: torch.Tensor = torch.linalg.solve_triangular(matrix, torch.eye(size, dtype=matrix.dtype), upper=True)
        return small
    half = size // 2
    out = torch.zeros_like(matrix)
    out[:half, :half] = _inverse_of_upper(matrix[:half, :half])
    out[half:, half:] = _inverse_of_upper(matrix[half:, half:])
    out[:half, half:] = -(out[:half, :half] @ matrix[:half, half:] @ out[half:, half:])
    return out


def _round(
    weight: torch.Tensor,
    factor: torch.Tensor,
    importance: torch.Tensor | None,
    order: torch.Tensor | None,
    options: GptqOptions,
    static: GroupParams,
) -> tuple[torch.Tensor, GroupParams, torch.Tensor | None]:
    """The rounding itself. static: parameters of the groups as they lie, for Order.STATIC."""
    grid, (rows, inputs) = options.grid, weight.shape
    size = grid.size(inputs)
    columns = torch.arange(inputs) if order is None else order
    w = weight[:, columns].clone()
    # The group of each column in the order of rounding, and where that group's parameters go.
    group_of = columns // size if options.order is not Order.FULL else torch.arange(inputs) // size
    weights = None if importance is None else importance[columns]
    scale, zero = static.scale.clone(), static.zero.clone()
    codes = torch.empty(inputs, rows, dtype=torch.uint8)
    for begin in range(0, inputs, _BLOCK):
        end = min(begin + _BLOCK, inputs)
        block = w[:, begin:end].T.contiguous()  # each column in one piece, as it is read and changed by itself
        errors = torch.empty_like(block)
        for i, column in enumerate(block, begin):
            group, place = int(group_of[i]), i - begin
            if options.order is not Order.STATIC and i % size == 0:
                ahead = block[place : place + size].T
                if end < i + size:  # beyond the block, its updates are still to come
                    beyond = w[:, end : i + size] - errors[:place].T @ factor[begin:i, end : i + size]
                    ahead = torch.cat((ahead, beyond), dim=1)
                part = None if weights is None else weights[None, i : i + size]
                params = find_params(ahead.contiguous()[:, None, :], grid, part)
                scale[:, group], zero[:, group] = params.scale[:, 0], params.zero[:, 0]
            s, z = scale[:, group], zero[:, group]
            q = (torch.round(column / s) + z).clamp_(0, grid.qmax)
            error = (column - (q - z) * s) / factor[i, i]
            codes[i] = q.to(torch.uint8)
            errors[place] = error
            block[place + 1 :] -= torch.outer(factor[i, i + 1 : end], error)
        w[:, end:] -= errors.T @ factor[begin:end, end:]
    out = torch.empty(rows, inputs, dtype=torch.uint8)
    out[:, columns] = codes.T
    if options.order is not Order.FULL:
        return out, GroupParams(scale, zero), None
    g_idx = torch.empty(inputs, dtype=torch.long)
    g_idx[columns] = group_of
    return out, GroupParams(scale, zero), g_idx


def _decode(codes: torch.Tensor, params: GroupParams, groups: torch.Tensor) -> torch.Tensor:
    return (codes.float() - params.zero[:, groups]) * params.scale[:, groups]
