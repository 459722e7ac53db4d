"""Sampling parameters as columns, one value for each row of logits, and the number that decides each draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from nybble.backends.cpu.sampling import checked_array
from nybble.backends.cpu.step import SampleRow

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True, slots=True)
class Columns:
    """How each row is drawn from, [rows] on the device. greedy: bool, the likeliest token. u: float64 in [0, 1)."""

    greedy: torch.Tensor
    temperature: torch.Tensor  # float32, 1 where a row is greedy
    top_k: torch.Tensor  # int32, 0: off
    top_p: torch.Tensor  # float32
    min_p: torch.Tensor  # float32
    u: torch.Tensor
    all_greedy: bool


def make_columns(rows: Sequence[SampleRow], device: torch.device) -> Columns:
    """Raises ValueError if a parameter is out of range."""
    temperature = checked_array([row.temperature for row in rows], np.float32, "temperature")
    top_p = checked_array([row.top_p for row in rows], np.float32, "top_p")
    min_p = checked_array([row.min_p for row in rows], np.float32, "min_p")
    top_k = checked_array([row.top_k for row in rows], np.int32, "top_k")
    _require(np.isfinite(temperature).all() and (temperature >= 0).all(), "temperature must be finite and not negative")
    _require(((top_p > 0) & (top_p <= 1)).all(), "top_p must be above 0 and at most 1")
    _require(((min_p >= 0) & (min_p <= 1)).all(), "min_p must be between 0 and 1")
    greedy = temperature < np.float32(_GREEDY_BELOW)
    u = np.array([0.0 if g else uniform(row.seed, row.position) for row, g in zip(rows, greedy, strict=True)])
    return Columns(
        greedy=_on(greedy, device),
        temperature=_on(np.where(greedy, np.float32(1), temperature), device),
        top_k=_on(top_k, device),
        top_p=_on(top_p, device),
        min_p=_on(min_p, device),
        u=_on(u, device),
        all_greedy=bool(greedy.all()),
    )


def uniform(seed: int, position: int) -> float:
    """Uniform in [0, 1): a hash of a counter, so that a draw depends on nothing else (the finaliser of splitmix64).

    The native sampler has the same function in model/sampler_draw.cpp.
    """
    for value, what in ((seed, "seed"), (position, "position")):
        _require(0 <= value <= _MASK, f"{what} must fit uint64")
    hashed = _mix((_mix((seed + _GOLDEN) & _MASK) + (position + 1) * _GOLDEN) & _MASK)
    return math.ldexp(hashed >> 11, -53)


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _on(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ValueError(message)
