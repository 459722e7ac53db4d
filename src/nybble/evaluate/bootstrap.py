"""Confidence intervals for figures over text: a block bootstrap, because neighbouring tokens resemble each other.

Künsch (1989), "The jackknife and the bootstrap for general stationary observations", with blocks that do not overlap.
The scored tokens are cut into runs of neighbours; a resample draws as many runs as there are, with replacement, and the
interval lies between the 2.5 % and the 97.5 % quantile of the figure over all resamples. The same draws serve every
figure and every model that reads the same text, so that two models can be compared pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
SEED = 20_240_714
LEVEL = 0.95
MIN_BLOCKS = 32  # windows are cut further until there are so many
_MIN_BLOCK_TOKENS = 8
_CELLS = 1 << 22  # of the largest array: 32 MB of float64

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % confidence interval; the bounds are NaN where there are too few tokens to say."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The same through an increasing function."""
        return Estimate(function(self.value), function(self.low), function(self.high))


def cut_blocks(windows: int, rows: int) -> npt.NDArray[np.int64]:
    """The number of the block that each of windows x rows scored tokens belongs to, in ascending order.

    A block is a window or an equal part of one: as long as possible, while there are MIN_BLOCKS of them.
    """
    parts = max(1, min(-(-MIN_BLOCKS // windows), rows // _MIN_BLOCK_TOKENS))
    within = np.arange(rows) * parts // rows
    return (np.arange(windows)[:, None] * parts + within[None]).reshape(-1)


class Bootstrap:
    """Resamples of one set of blocks."""

    def __init__(self, block_of: npt.NDArray[np.int64], *, resamples: int = RESAMPLES, seed: int = SEED) -> None:
        """block_of: the block of each token, counted from 0."""
        self._block_of = block_of
        self.num_blocks = int(block_of[-1]) + 1
        self._tokens = np.bincount(block_of, minlength=self.num_blocks).astype(np.float64)
        draws = np.random.default_rng(seed).integers(self.num_blocks, size=(resamples, self.num_blocks))
        offsets = np.arange(resamples)[:, None] * self.num_blocks
        counts = np.bincount((draws + offsets).reshape(-1), minlength=resamples * self.num_blocks)
        self._weights = counts.reshape(resamples, self.num_blocks)  # how often each block is in each resample

    def block_means(self, values: Floats) -> Floats:
        """The mean of each block."""
        means: Floats = np.bincount(self._block_of, weights=values, minlength=self.num_blocks) / self._tokens
        return means

    def mean(self, values: Floats) -> Estimate:
        """The mean over all tokens."""
        sums = np.bincount(self._block_of, weights=values, minlength=self.num_blocks)
        return self._estimate(float(values.mean()), (self._weights @ sums) / (self._weights @ self._tokens))

    def quantile(self, values: Floats, q: float) -> Estimate:
        """A quantile over all tokens, interpolated between neighbours as numpy does it."""
        order = np.argsort(values, kind="stable")
        ascending, blocks = values[order], self._block_of[order]
        found = []
        step = max(1, _CELLS // values.size)
        for begin in range(0, len(self._weights), step):
            ends = self._weights[begin : begin + step, blocks].cumsum(axis=1)  # tokens up to and with each value
            place = q * (ends[:, -1] - 1)
            below = np.floor(place).astype(np.int64)
            first = ascending[(ends <= below[:, None]).sum(axis=1)]
            above = np.minimum(below + 1, ends[:, -1] - 1)
            second = ascending[(ends <= above[:, None]).sum(axis=1)]
            found.append(first + (second - first) * (place - below))
        return self._estimate(float(np.quantile(values, q)), np.concatenate(found))

    def _estimate(self, value: float, resampled: Floats) -> Estimate:
        if self.num_blocks < 2:
            return Estimate(value, math.nan, math.nan)
        low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(low), float(high))
