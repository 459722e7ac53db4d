"""The tiles that products can be cut into, and which of them are worth trying for a shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

FEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Tile:
    """tokens x rows of a program's piece of y, programs that share the inputs of one piece, and how one is run."""

    tokens: int
    rows: int
    splits: int
    warps: int
    stages: int


def few_tokens(tile: Tile) -> bool:
    """Whether a tile is for products that wait for the codes rather than for arithmetic."""
    return tile.tokens <= FEW_TOKENS


def bucket(m: int) -> int:
    """Shapes with as many tokens share a tile: up to 16, 64, 256, and more."""
    return next((size for size in (16, 64, 256) if m <= size), 1024)


def candidates(m: int, n: int, k: int, processors: int) -> list[Tile]:
    """Tiles to try for y [m, n] over k inputs, the safest guess first."""
    size = bucket(m)
    if size == 16:
        shapes = [(16, 64, 4, 4), (16, 64, 4, 6), (16, 128, 8, 4), (16, 32, 4, 4)]
    elif size == 64:
        shapes = [(64, 64, 4, 3), (64, 128, 8, 3), (32, 64, 4, 4)]
    else:
        shapes = [(128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (128, 256, 8, 2)]
    found = []
    for tokens, rows, warps, stages in shapes:
        programs = triton.cdiv(n, rows) * triton.cdiv(m, tokens)
        for factor in (2, 4) if size == 16 else (1,):
            splits = max(1, min(16, factor * processors // programs, k // 512)) if programs < processors * 2 else 1
            tile = Tile(tokens, rows, 1 << (splits.bit_length() - 1), warps, stages)
            if tile not in found:
                found.append(tile)
    return found


def add_parts(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[splits, m, n] -> [m, n], in one fixed order."""
    return parts[0] if len(parts) == 1 else parts.sum(0).to(dtype)
