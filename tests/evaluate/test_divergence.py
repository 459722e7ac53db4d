from __future__ import annotations

import numpy as np
import pytest

from nybble.evaluate.divergence import divergence, streamed_divergence

pytestmark = pytest.mark.unit


def test_known_distributions() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    result = divergence(np.log(p)[None], np.log(q)[None] + 3.0)  # a constant does not matter
    assert result.mean_kl == pytest.approx((p * np.log(p / q)).sum(), abs=1e-15)
    assert (result.top1_agreement, result.rows) == (0.0, 1)


def test_equal_logits_do_not_diverge() -> None:
    logits = np.random.default_rng(0).normal(size=(100, 50)).astype(np.float32)
    result = divergence(logits, logits)
    assert (result.mean_kl, result.max_kl, result.top1_agreement, result.rows) == (0.0, 0.0, 1.0, 100)


def test_pieces_give_what_the_whole_gives() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(70, 40)).astype(np.float32), rng.normal(size=(70, 40)).astype(np.float32)
    pieces = streamed_divergence((a[i : i + 7], b[i : i + 7]) for i in range(0, 70, 7))
    assert pieces == divergence(a, b)
    assert pieces.median_kl < pieces.p99_kl <= pieces.max_kl


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4))),
        (np.zeros((0, 3)), np.zeros((0, 3))),
        (np.full((1, 3), np.nan), np.zeros((1, 3))),
    ],
)
def test_what_cannot_be_compared_is_refused(a: np.ndarray, b: np.ndarray) -> None:
    with pytest.raises(ValueError):
        divergence(a, b)
