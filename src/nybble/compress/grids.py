"""Round-to-nearest grids of integers: scales and zero points of groups, and the search for where to clip.

    asymmetric            scale = (max - min) / qmax, zero = round(-min / scale), 0 always inside
    symmetric, full range scale = w / -2**(bits - 1), w the signed weight of largest size; zero = 2**(bits - 1)

A scale is rounded to the type that a file keeps it in before any weight is rounded with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_SHRINKS = 40  # of the range, in steps of 1/80 down to half of it
_STEP = 1.0 / 80
_CHUNK = 1 << 18  # weights searched at once: they and what is made of them stay in the cache


@dataclass(frozen=True, slots=True)
class Grid:
    """bits: 2 to 8. group_size: inputs per scale, -1: a whole row. search: look for the best clipping.

    least_zero: 1 for files that store asymmetric zero points less one.
    """

    bits: int
    group_size: int
    symmetric: bool = True
    search: bool = False
    scale_dtype: torch.dtype = torch.float16
    least_zero: int = 0

    @property
    def qmax(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)

    def size(self, in_features: int) -> int:
        """Inputs per group of a matrix of this width."""
        return in_features if self.group_size == -1 else self.group_size


@dataclass(frozen=True, slots=True)
class GroupParams:
    """scale and zero: [rows, groups], the zero point as a float."""

    scale: torch.Tensor
    zero: torch.Tensor

    def codes(self, groups: torch.Tensor, qmax: int) -> torch.Tensor:
        """groups: [rows, groups, size] -> nearest codes, as floats."""
        q = torch.round(groups / self.scale[..., None]) + self.zero[..., None]
        return q.clamp_(0, qmax)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes - self.zero[..., None]) * self.scale[..., None]


def find_params(groups: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> GroupParams:
    """Scales and zero points of `groups` [rows, groups, size].

    importance: [groups, size] or [size], E[x^2] of each input: with grid.search, the error that the search makes small
    is weighted by it.
    """
    params = _params(groups, grid, 1.0)
    if not grid.search:
        return params
    rows = max(1, _CHUNK // (groups.shape[1] * groups.shape[2]))
    parts = [
        _searched(
            groups[i : i + rows], grid, importance, GroupParams(params.scale[i : i + rows], params.zero[i : i + rows])
        )
        for i in range(0, groups.shape[0], rows)
    ]
    return GroupParams(torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]))


def _searched(groups: torch.Tensor, grid: Grid, importance: torch.Tensor | None, best: GroupParams) -> GroupParams:
    def error(params: GroupParams) -> torch.Tensor:
        squares = (params.decode(params.codes(groups, grid.qmax)) - groups).square_()
        return squares.sum(-1) if importance is None else (squares * importance).sum(-1)

    scale, zero, least = best.scale.clone(), best.zero.clone(), error(best)
    for i in range(1, _SHRINKS + 1):
        params = _params(groups, grid, 1.0 - i * _STEP)
        found = error(params)
        better = found < least
        least = torch.where(better, found, least)
        scale, zero = torch.where(better, params.scale, scale), torch.where(better, params.zero, zero)
    return GroupParams(scale, zero)


def _params(groups: torch.Tensor, grid: Grid, shrink: float) -> GroupParams:
    if grid.symmetric:
        low, high = groups.amin(-1), groups.amax(-1)
        extreme = torch.where(high > -low, high, low)
        scale = _stored(extreme * (-shrink / grid.middle), grid)
        return GroupParams(scale, torch.full_like(scale, grid.middle))
    low, high = groups.amin(-1).clamp(max=0) * shrink, groups.amax(-1).clamp(min=0) * shrink
    # No more than what the codes above the least zero point reach.
    wide = torch.maximum((high - low) / grid.qmax, high / (grid.qmax - grid.least_zero))
    scale = _stored(wide, grid)
    return GroupParams(scale, torch.round(-low / scale).clamp_(grid.least_zero, grid.qmax))


def _stored(scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Rounded to the type of the file, and kept in its range, which groups of zeros or huge weights would leave."""
    limits = torch.finfo(grid.scale_dtype)
    sign = torch.where(scale < 0, -1.0, 1.0)
    size = scale.abs().clamp(min=limits.tiny, max=limits.max)
    return (sign * size).to(grid.scale_dtype).float()


def round_to_nearest(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, GroupParams]:
    """Codes uint8 [out, in] and the parameters of their groups. importance: [in], E[x^2] of each input."""
    rows, inputs = weight.shape
    size = grid.size(inputs)
    groups = weight.reshape(rows, inputs // size, size)
    params = find_params(groups, grid, None if importance is None else importance.reshape(-1, size))
    return params.codes(groups, grid.qmax).reshape(rows, inputs).to(torch.uint8), params
