"""The learning rate of each step: up in a line, down in a cosine."""

from __future__ import annotations

import math

_LEAST = 0.01  # of the peak, at the end


def factor(step: int, *, warmup: int, total: int | None) -> float:
    """What the peak is multiplied by in step 0, 1, ... total: None while nobody knows how many there will be."""
    rising = min(1.0, (step + 1) / max(1, warmup))
    if total is None or total <= 1:
        return rising
    progress = min(1.0, step / total)
    return rising * (_LEAST + (1 - _LEAST) * 0.5 * (1 + math.cos(math.pi * progress)))
