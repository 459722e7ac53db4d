"""The loss of a training run as a picture, from its log."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from nybble.evaluate.pareto import FONT, HEIGHT, WIDTH, Line, Shape, Text

_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 26, 26, 52
_MAX_POINTS = 400
_TICKS = 5

Points = Sequence[tuple[float, float]]


def read_curve(log: Path) -> list[tuple[float, float]]:
    """Step and loss of each line that has both; means of neighbours where there are very many."""
    points = []
    if log.is_file():
        for line in log.read_text("utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed
            step, loss = (entry.get(key) if isinstance(entry, dict) else None for key in ("step", "loss"))
            if isinstance(step, int | float) and isinstance(loss, int | float) and math.isfinite(loss):
                points.append((float(step), float(loss)))
    size = -(-len(points) // _MAX_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)] if size > 1 else [[point] for point in points]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def draw_curve(points: Points) -> list[Shape]:
    """points: at least two, with ascending steps."""
    first, last = points[0][0], points[-1][0]
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def x(step: float) -> float:
        return _LEFT + (right - _LEFT) * (step - first) / max(last - first, 1e-9)

    def y(loss: float) -> float:
        return bottom - (bottom - _TOP) * (loss - low) / (high - low)

    shapes: list[Shape] = []
    for i in range(_TICKS + 1):
        loss, step = low + (high - low) * i / _TICKS, first + (last - first) * i / _TICKS
        shapes += [
            Line(_LEFT, y(loss), right, y(loss), "grid"),
            Text(_LEFT - 8, y(loss) + FONT / 3, f"{loss:.3g}", "end"),
        ]
        shapes.append(Text(x(step), bottom + 18, f"{step:.0f}", "middle"))
    shapes += [Line(_LEFT, bottom, right, bottom, "axis"), Line(_LEFT, _TOP, _LEFT, bottom, "axis")]
    for (step, loss), (next_step, next_loss) in pairwise(points):
        shapes.append(Line(x(step), y(loss), x(next_step), y(next_loss), "front"))
    shapes += [Text((_LEFT + right) / 2, HEIGHT - 12, "step", "middle"), Text(20, HEIGHT / 2, "loss", "middle", True)]
    return shapes
