"""A report's figures as text, the same in the terminal, on the page and in documents."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nybble.evaluate.bootstrap import Estimate
from nybble.evaluate.report import Report, Result

ALONE = ("model", "MB", "bits", "of layers", "perplexity")
COMPARED = ("KL mean", "KL median", "KL p99", "same top", "flips", "lost", "won")


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure; its interval is empty where there is none. margin: half the interval's width."""

    value: str
    interval: str = ""
    margin: str = ""


def columns(report: Report) -> tuple[str, ...]:
    """The names of the columns; without a reference those that need one are left out."""
    return ALONE if report.reference is None else ALONE + COMPARED


def cells(report: Report) -> list[list[Cell]]:
    """One row per model, the reference first."""
    rows = []
    for one in report.rows:
        row = _alone(one, " (reference)" if one is report.reference else "")
        if report.reference is not None:
            row += _compared(one)
        rows.append(row)
    return rows


def _alone(one: Result, remark: str) -> list[Cell]:
    return [
        Cell(one.name + remark),
        Cell(f"{one.bytes / 1e6:.1f}"),
        Cell(f"{one.bpw:.2f}"),
        Cell(f"{one.linear_bpw:.2f}"),
        _number(one.quality.perplexity),
    ]


def _compared(one: Result) -> list[Cell]:
    if one.loss is None:
        return [Cell("")] * len(COMPARED)
    loss = one.loss
    numbers = [_number(estimate, 3) for estimate in (loss.mean_kl, loss.median_kl, loss.p99_kl)]
    parts = [_share(estimate) for estimate in (loss.right_to_wrong, loss.wrong_to_right)]  # of the flips
    parts = [Cell(cell.value, cell.interval) for cell in parts]
    return [*numbers, _share(loss.top1_agreement), _share(loss.flips), *parts]


def _number(estimate: Estimate, digits: int = 4) -> Cell:
    value, low, high = (significant(one, digits) for one in (estimate.value, estimate.low, estimate.high))
    return (
        Cell(value) if math.isnan(estimate.low) else Cell(value, f"{low} to {high}", significant(_margin(estimate), 2))
    )


def _share(estimate: Estimate) -> Cell:
    if math.isnan(estimate.low):
        return Cell(f"{estimate.value:.2%}")
    bounds = f"{estimate.low:.2%} to {estimate.high:.2%}"
    return Cell(f"{estimate.value:.2%}", bounds, f"{_margin(estimate) * 100:.2f}")


def _margin(estimate: Estimate) -> float:
    return (estimate.high - estimate.low) / 2


def significant(value: float, digits: int = 4) -> str:
    """So many figures without an exponent, so that rows can be compared at a glance; with one below 0.00001."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-5 or abs(value) >= 1e6:
        return f"{value:.1e}"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"
