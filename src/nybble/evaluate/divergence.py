"""How far a model's predictions lie from a reference's: KL divergence and agreement of the likeliest token."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_ROWS = 32  # converted to float64 at once

Logits = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(reference || other) in nats over rows of logits, computed in float64."""

    mean_kl: float
    median_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: float  # fraction of rows with the same likeliest token
    rows: int


def divergence(reference: Logits, other: Logits) -> Divergence:
    """Compare two arrays of logits [rows, vocab].

    Raises:
        ValueError: their shapes differ, there are no rows, or a logit is not finite.
    """
    return streamed_divergence([(reference, other)])


def streamed_divergence(pairs: Iterable[tuple[Logits, Logits]]) -> Divergence:
    """The same over pieces that need not be in memory together.

    Raises:
        ValueError: as `divergence`.
    """
    kl, same = [], []
    for reference, other in pairs:
        if reference.shape != other.shape or reference.ndim != 2:
            raise ValueError(f"logits of shapes {reference.shape} and {other.shape} cannot be compared row by row")
        for begin in range(0, len(reference), _ROWS):
            a, b = reference[begin : begin + _ROWS], other[begin : begin + _ROWS]
            kl.append(kl_rows(a, b))
            same.append(a.argmax(axis=-1) == b.argmax(axis=-1))
    if not kl:
        raise ValueError("there are no logits to compare")
    values, agreement = np.concatenate(kl), np.concatenate(same)
    median, p99 = np.quantile(values, [0.5, 0.99])
    return Divergence(
        float(values.mean()), float(median), float(p99), float(values.max()), float(agreement.mean()), values.size
    )


def kl_rows(reference: Logits, other: Logits) -> npt.NDArray[np.float64]:
    """KL(reference || other) of each row. Tiny negative values are rounding and stay: they average out.

    Raises:
        ValueError: a logit is not finite.
    """
    log_p, log_q = _log_softmax(reference), _log_softmax(other)
    rows: npt.NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return rows


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("a logit is not finite")
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x
