"""How large the tiles of attention are: what fits the registers and the shared memory of the GPU at hand.

Chosen for compute capability 9.0 by what its compiler reports, not by measurement. Where a GPU has less shared memory,
fewer tiles are on their way at a time, then they are smaller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton

from nybble.backends.torch.flash.numbers import interpreted

HOPPER_SHARED_BYTES = 232448


@dataclass(frozen=True, slots=True)
class Tiles:
    """Queries and keys of a tile, and how a program is run."""

    queries: int
    keys: int
    warps: int
    stages: int


def forward_tiles(q: torch.Tensor) -> Tiles:
    """For q [tokens, heads, head_dim] of this width and type."""
    width, item = int(triton.next_power_of_2(q.shape[2])), q.element_size()
    if interpreted():  # small tiles, so that small tests have several of them
        return Tiles(16, 16, 4, 1)
    if item == 4:
        wanted = Tiles(64, 16, 8, 2) if width <= 128 else Tiles(32, 16, 8, 1)
    elif width <= 64:
        wanted = Tiles(128, 64, 4, 3)
    else:
        wanted = Tiles(128, 64, 8, 3 if width <= 128 else 2)
    return fitting(wanted, lambda t: item * width * (t.queries + 2 * t.keys * t.stages), shared_bytes(q.device))


def backward_tiles(q: torch.Tensor) -> Tiles:
    """The same for the other direction, which keeps two sums."""
    width, item = int(triton.next_power_of_2(q.shape[2])), q.element_size()
    if interpreted():
        return Tiles(16, 16, 4, 1)
    if item == 4:
        wanted = Tiles(32, 32, 8, 1) if width <= 128 else Tiles(16, 16, 8, 1)
    elif width <= 64:
        wanted = Tiles(64, 64, 4, 2)
    else:
        wanted = Tiles(64, 64, 8, 2 if width <= 128 else 1)

    def needed(t: Tiles) -> int:
        held, moving = min(t.queries, t.keys), max(t.queries, t.keys)
        return item * width * (2 * held + 2 * moving * t.stages) + 4 * t.queries * t.keys

    return fitting(wanted, needed, shared_bytes(q.device))


def fitting(tiles: Tiles, needed: Callable[[Tiles], int], limit: int) -> Tiles:
    """The tiles, or the next smaller ones whose bytes are within the limit; 16 x 16 at least."""
    while needed(tiles) > limit:
        if tiles.stages > 1:
            tiles = replace(tiles, stages=tiles.stages - 1)
        elif tiles.keys > 16:
            tiles = replace(tiles, keys=tiles.keys // 2)
        elif tiles.queries > 16:
            tiles = replace(tiles, queries=tiles.queries // 2)
        else:
            break
    return tiles


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have on a GPU; Hopper's where there is none, to compile for it."""
    if device.type != "cuda":
        return HOPPER_SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 48 << 10))  # not in torch's type hints
