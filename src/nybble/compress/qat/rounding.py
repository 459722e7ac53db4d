"""Rounding that gradients pass: straight through to the weight, and to scales and offsets as LSQ has it.

    value = scale * code - offset,   code = round((weight + offset) / scale), kept between low and high

For a weight inside of the range the gradient goes to the weight as if nothing had been rounded, and to the scale as
code - (weight + offset) / scale; outside it goes to the scale as the code at the end of the range, and to the offset
(Esser et al. 2020, arXiv 1902.08153; Bhalgat et al. 2020, arXiv 2004.09576).
"""

from __future__ import annotations

from typing import Any

import torch

_CHUNK = 1 << 18  # weights


def round_groups(
    weight: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    low: torch.Tensor,
    high: torch.Tensor,
) -> torch.Tensor:
    """Values on the grid. weight: [rows, groups, size]; the others [rows, groups], low and high also [1]."""
    found: torch.Tensor = _Round.apply(weight, scale, offset, low, high)  # type: ignore[no-untyped-call]
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
    """Works on some rows at a time: what they need stays in the processor's cache."""

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
        out = torch.empty_like(weight)
        for part in _parts(weight):
            own = _rows(part, scale, offset, low, high)
            values = codes_of(weight[part], *own).mul_(own[0][..., None])
            out[part] = values if own[1] is None else values.sub_(own[1][..., None])
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, scale, offset, low, high = ctx.saved_tensors
        to_weight, to_scale = torch.empty_like(weight), torch.empty_like(scale)
        to_offset = None if offset is None else torch.empty_like(offset)
        for part in _parts(weight):
            own = _rows(part, scale, offset, low, high)
            place, seen = _place(weight[part], own[0], own[1]), grad[part]
            least, most = own[2][..., None], own[3][..., None]
            codes = place.round().clamp_(least, most)
            # The gradient where the weight is inside of the range, a rounding beyond its ends included.
            inside = torch.mul(seen, place.clamp(least, most) == place, out=to_weight[part])
            # code - place inside, the end of the range outside
            to_scale[part] = codes.mul_(seen).sub_(place.mul_(inside)).sum(-1)
            if to_offset is not None:
                to_offset[part] = inside.sum(-1) - seen.sum(-1)
        return to_weight, to_scale, to_offset, None, None


def _parts(weight: torch.Tensor) -> list[slice]:
    rows = max(1, _CHUNK // (weight.shape[1] * weight.shape[2]))
    return [slice(i, i + rows) for i in range(0, len(weight), rows)]


def _rows(
    part: slice, scale: torch.Tensor, offset: torch.Tensor | None, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """What belongs to some rows. Ends of the range may be the same for all."""
    whole = len(low) == 1
    own = None if offset is None else offset[part]
    return scale[part], own, low if whole else low[part], high if whole else high[part]


def stored_as(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Values as a type of 16 bits keeps them, float32 again; the gradient passes."""
    found: torch.Tensor = _Stored.apply(values, dtype)  # type: ignore[no-untyped-call]
    return found


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        limits = torch.finfo(dtype)
        return values.clamp(-limits.max, limits.max).to(dtype).float()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


def whole_numbers(values: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The nearest whole numbers between low and high; the gradient passes where they are between."""
    found: torch.Tensor = _Whole.apply(values, low, high)  # type: ignore[no-untyped-call]
    return found


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, low: int, high: int) -> torch.Tensor:
        ctx.save_for_backward((values >= low) & (values <= high))
        return values.round().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None
