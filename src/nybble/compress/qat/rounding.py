"""Rounding that gradients pass: straight through to the weight, and to scales and offsets as LSQ has it.

    value = scale * code - offset,   code = round((weight + offset) / scale), kept between low and high

For a weight inside of the range the gradient goes to the weight as if nothing had been rounded, and to the scale as
code - (weight + offset) / scale; outside it goes to the scale as the code at the end of the range, and to the offset
(Esser et al. 2020, arXiv 1902.08153; Bhalgat et al. 2020, arXiv 2004.09576).
"""

from __future__ import annotations

from typing import Any

import torch


def round_groups(
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    low: torch.Tensor,
    high: torch.Tensor,
) -> torch.Tensor:
    """Values on the grid. weight: [rows, groups, size]; the others [rows, groups], low and high also [1]."""
    found: torch.Tensor = _Round.apply(weight, scale, offset, low, high)
    return found


def codes_of(
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    low: torch.Tensor,
    high: torch.Tensor,
) -> torch.Tensor:
    """The codes that `round_groups` takes, as floats."""
    return _place(weight, scale, offset).round_().clamp_(low[..., None], high[..., None])


def _place(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
    """Where weights lie on the grid, before they are rounded. A scale of 0 has all of them at 0."""
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale)[..., None]
    return weight * inverse if offset is None else (weight + offset[..., None]).mul_(inverse)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor | None,
        low: torch.Tensor,
        high: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, scale, offset, low, high)
        values = codes_of(weight, scale, offset, low, high).mul_(scale[..., None])
        return values if offset is None else values.sub_(offset[..., None])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        weight, scale, offset, low, high = ctx.saved_tensors
        place = _place(weight, scale, offset)
        low, high = low[..., None], high[..., None]
        inside = (place >= low) & (place <= high)
        to_weight = grad * inside
        # code - place inside, the end of the range outside
        step = place.round().clamp_(low, high).sub_(place.mul_(inside))
        to_scale = step.mul_(grad).sum(-1)
        to_offset = None if offset is None else to_weight.sum(-1) - grad.sum(-1)
        return to_weight, to_scale, to_offset, None, None


def stored_as(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values as a type of 16 bits keeps them, float32 again; the gradient passes."""
    found: torch.Tensor = _Stored.apply(values, dtype)
    return found


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        limits = torch.finfo(dtype)
        return values.clamp(-limits.max, limits.max).to(dtype).float()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad, None


def whole_numbers(values: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The nearest whole numbers between low and high; the gradient passes where they are between."""
    found: torch.Tensor = _Whole.apply(values, low, high)
    return found


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, low: int, high: int) -> torch.Tensor:
        ctx.save_for_backward((values >= low) & (values <= high))
        return values.round().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None
