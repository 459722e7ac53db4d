"""Size against loss as a picture: plain shapes, which `picture` writes as SVG or PNG.

A model is on the Pareto front if none is both smaller (or as small) and better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from nybble.evaluate.report import Report

WIDTH, HEIGHT = 880, 520
FONT = 12  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 26, 26, 52
_LETTER = 0.62 * FONT  # about the width of one

Role = Literal["grid", "axis", "front", "whisker", "point", "best"]
Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True, slots=True)
class Line:
    x1: float
    y1: float
    x2: float
    y2: float
    role: Role


@dataclass(frozen=True, slots=True)
class Dot:
    x: float
    y: float
    role: Role
    title: str  # shown when the pointer rests on it


@dataclass(frozen=True, slots=True)
class Text:
    x: float
    y: float  # of the base line
    text: str
    anchor: Anchor = "start"
    upwards: bool = False  # written from bottom to top


Shape = Line | Dot | Text


@dataclass(frozen=True, slots=True)
class Point:
    """One model. low, high: its confidence interval, NaN if there is none."""

    name: str
    size: float  # MB
    value: float
    low: float
    high: float


def points(report: Report) -> tuple[list[Point], str]:
    """Models as points, and what their height means. Without a reference it is the perplexity."""
    found = []
    for model in report.models if report.reference is not None else report.rows:
        estimate = model.quality.perplexity if model.loss is None else model.loss.mean_kl
        found.append(Point(model.name, model.bytes / 1e6, estimate.value, estimate.low, estimate.high))
    return found, "perplexity" if report.reference is None else "mean KL divergence, nats"


def front(found: Sequence[Point]) -> list[Point]:
    """The points that no other beats, by size."""
    best: list[Point] = []
    for point in sorted(found, key=lambda one: (one.size, one.value)):
        if not best or point.value < best[-1].value:
            best.append(point)
    return best


def draw(report: Report) -> list[Shape]:
    """The picture of a report, WIDTH x HEIGHT pixels, y downwards."""
    found, meaning = points(report)
    sizes = [point.size for point in found]
    values = [v for point in found for v in (point.value, point.low, point.high) if math.isfinite(v)]
    # KL divergence spans decades; a model equal to its reference has none at all.
    logarithmic = report.reference is not None and min(values) > 0
    across = _Axis.over(sizes, _LEFT, WIDTH - _RIGHT, logarithmic=max(sizes) > 2 * min(sizes))
    up = _Axis.over(values, HEIGHT - _BOTTOM, _TOP, logarithmic=logarithmic)
    shapes: list[Shape] = [*_frame(across, up, meaning)]
    best = front(found)
    for left, right in pairwise(best):
        shapes.append(Line(across(left.size), up(left.value), across(right.size), up(right.value), "front"))
    taken: list[_Box] = [_Box.around(across(one.size), up(one.value), 4) for one in found]
    for point in found:
        x, y = across(point.size), up(point.value)
        if math.isfinite(point.low):
            shapes.append(Line(x, up(point.low), x, up(point.high), "whisker"))
        shapes.append(
            Dot(x, y, "best" if point in best else "point", f"{point.name}: {point.size:.1f} MB, {point.value:.4g}")
        )
    for point in sorted(found, key=lambda one: one not in best):  # those of the front choose first
        label = _label(across(point.size), up(point.value), point.name, taken)
        if label is not None:
            shapes.append(label)
    return shapes


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values to pixels."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], begin: float, end: float, *, logarithmic: bool) -> _Axis:
        low, high = min(values), max(values)
        if logarithmic:
            pad = (high / low) ** 0.06 if high > low else 1.1
            low, high = low / pad, high * pad
            ticks = _decades(low, high) if high > 10 * low else _round_numbers(low, high)
            return cls(math.log(low), math.log(high), begin, end, True, tuple(ticks))
        pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        low, high = low - pad, high + pad
        return cls(low, high, begin, end, False, tuple(_round_numbers(low, high)))

    def __call__(self, value: float) -> float:
        at = math.log(max(value, math.exp(self.low))) if self.logarithmic else value
        return self.begin + (min(max(at, self.low), self.high) - self.low) / (self.high - self.low) * (
            self.end - self.begin
        )


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten between the two; powers alone when there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 5 else (1,)
    return [tick for power in powers for step in steps if low <= (tick := step * 10.0**power) <= high]


def _round_numbers(low: float, high: float) -> list[float]:
    rough = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [number * step for number in range(first, last + 1)]


def _frame(across: _Axis, up: _Axis, meaning: str) -> list[Shape]:
    left, right, top, bottom = _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM
    shapes: list[Shape] = []
    for tick in across.ticks:
        shapes.append(Line(across(tick), top, across(tick), bottom, "grid"))
        shapes.append(Text(across(tick), bottom + 18, f"{tick:.10g}", "middle"))
    for tick in up.ticks:
        shapes.append(Line(left, up(tick), right, up(tick), "grid"))
        shapes.append(Text(left - 8, up(tick) + 4, f"{tick:.4g}", "end"))
    shapes += [Line(left, bottom, right, bottom, "axis"), Line(left, top, left, bottom, "axis")]
    shapes.append(Text((left + right) / 2, HEIGHT - 10, "size, MB", "middle"))
    shapes.append(Text(16, (top + bottom) / 2, f"{meaning} (lower is better)", "middle", upwards=True))
    return shapes


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def around(cls, x: float, y: float, radius: float) -> _Box:
        return cls(x - radius, y - radius, x + radius, y + radius)

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self) -> bool:
        return self.left > _LEFT and self.right < WIDTH and self.top > 0 and self.bottom < HEIGHT - _BOTTOM


def _label(x: float, y: float, name: str, taken: list[_Box]) -> Text | None:
    """A name where it hides nothing; None if there is no such place (the dot still says it on a page)."""
    width = _LETTER * len(name)
    beside: list[tuple[float, float, Anchor]] = [
        (x + 8, y + 4, "start"), (x - 8, y + 4, "end"), (x, y - 9, "middle"), (x, y + 18, "middle"),
        (x + 6, y - 8, "start"), (x + 6, y + 16, "start"), (x - 6, y - 8, "end"), (x - 6, y + 16, "end"),
        (x + 10, y - 20, "start"), (x + 10, y + 28, "start"), (x - 10, y - 20, "end"), (x - 10, y + 28, "end"),
    ]  # fmt: skip
    shift: dict[Anchor, float] = {"start": 0, "middle": width / 2, "end": width}
    for at, base, anchor in beside:
        left = at - shift[anchor]
        box = _Box(left, base - FONT + 2, left + width, base + 2)
        if box.inside() and not any(box.meets(other) for other in taken):
            taken.append(box)
            return Text(at, base, name, anchor)
    return None
