"""Integers of 2, 4 or 8 bits in groups with learned scales: the grids of compressed-tensors folders."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from nybble.compress.grids import Grid, find_params
from nybble.compress.qat.rounding import codes_of, round_groups, stored_as
from nybble.quant.weights import GroupedInt


class IntegerGrid(nn.Module):
    """Makes of a linear's weight the values of the codes nearest to it.

    Scales start where round-to-nearest has them, are learned as factors on that, and are always those that the file
    can keep. Zero points stay. importance: [in], E[x^2] of each input, for the search of the first scales.
    """

    start: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, weight: torch.Tensor, grid: Grid, importance: torch.Tensor | None = None) -> None:
        super().__init__()
        self.grid = grid
        size = grid.size(weight.shape[1])
        weights = None if importance is None else importance.reshape(-1, size)
        params = find_params(weight.reshape(len(weight), -1, size), grid, weights)
        self.scale = nn.Parameter(torch.zeros_like(params.scale))  # logarithm of the factor
        self.register_buffer("start", params.scale)
        self.register_buffer("low", -params.zero)
        self.register_buffer("high", grid.qmax - params.zero)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, in] -> the same on the grid."""
        groups = weight.reshape(*self.start.shape, -1)
        return round_groups(groups, self._scale(), None, self.low, self.high).reshape(weight.shape)

    def _scale(self) -> torch.Tensor:
        return stored_as(self.start * self.scale.exp(), self.grid.scale_dtype)

    @torch.no_grad()
    def export(self, weight: torch.Tensor) -> GroupedInt:
        """What the file holds: it decodes to what `forward` gives, bit for bit."""
        groups = weight.reshape(*self.start.shape, -1)
        scale = self._scale()
        codes = (codes_of(groups, scale, None, self.low, self.high) - self.low[..., None]).to(torch.uint8)
        return GroupedInt(
            self.grid.bits,
            groups.shape[-1],
            codes.reshape(weight.shape).cpu().numpy(),
            scale.cpu().numpy(),
            None if self.grid.symmetric else (-self.low).cpu().numpy().astype(np.int16),
        )


class StoredFloats(nn.Module):
    """Norms and biases as a folder keeps them. plus_one: it keeps them less one."""

    def __init__(self, dtype: torch.dtype, *, plus_one: bool) -> None:
        super().__init__()
        self._dtype = dtype
        self._plus_one = plus_one

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return stored_as(values - 1, self._dtype) + 1 if self._plus_one else stored_as(values, self._dtype)
