"""The processes that compute one model together, as its layers see them."""

from __future__ import annotations

from typing import Protocol

import torch


class Group(Protocol):
    """rank: of this process, 0 is the engine's. size: how many there are."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, on each of them; x may be overwritten."""

    def gather_columns(self, x: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        """[rows, widths[rank]] of each rank side by side, [rows, sum(widths)], on each of them."""


class Alone:
    """One process that has everything."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather_columns(self, x: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        return x
