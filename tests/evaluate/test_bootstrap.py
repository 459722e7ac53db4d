"""Confidence intervals: against resamples that are really drawn, and against a truth that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nybble.evaluate.bootstrap import MIN_BLOCKS, SEED, Bootstrap, cut_blocks

pytestmark = pytest.mark.unit


def by_hand(values: np.ndarray, block_of: np.ndarray, figure: object, resamples: int) -> list[float]:
    """The bounds, from resamples that are put together value by value."""
    blocks = [values[block_of == block] for block in range(block_of[-1] + 1)]
    draws = np.random.default_rng(SEED).integers(len(blocks), size=(resamples, len(blocks)))
    found = [figure(np.concatenate([blocks[i] for i in draw])) for draw in draws]  # type: ignore[operator]
    return [float(bound) for bound in np.quantile(found, [0.025, 0.975])]


@pytest.mark.parametrize(("windows", "rows"), [(7, 13), (40, 9), (3, 255)])
def test_bounds_are_those_of_drawn_resamples(windows: int, rows: int) -> None:
    values = np.random.default_rng(1).gamma(0.5, size=windows * rows)
    values[::5] = values[0]  # ties
    block_of = cut_blocks(windows, rows)
    bootstrap = Bootstrap(block_of, resamples=150)
    for q in (0.0, 0.5, 0.99, 1.0):
        found = bootstrap.quantile(values, q)
        assert found.value == np.quantile(values, q)
        assert [found.low, found.high] == pytest.approx(
            by_hand(values, block_of, lambda x, q=q: np.quantile(x, q), 150), rel=1e-12
        )
    mean = bootstrap.mean(values)
    assert mean.value == values.mean()
    assert [mean.low, mean.high] == pytest.approx(by_hand(values, block_of, np.mean, 150), rel=1e-12)


def test_blocks_are_windows_when_there_are_enough() -> None:
    assert cut_blocks(MIN_BLOCKS, 5).tolist() == [window for window in range(MIN_BLOCKS) for _ in range(5)]


def test_few_windows_are_cut_into_equal_parts() -> None:
    blocks = cut_blocks(16, 255)
    sizes = np.bincount(blocks)
    assert (len(sizes), sizes.min(), sizes.max()) == (32, 127, 128)
    assert (np.diff(blocks) >= 0).all()
    assert blocks[254] != blocks[255]  # no block reaches over the end of a window


def test_short_windows_are_not_cut_to_nothing() -> None:
    assert np.bincount(cut_blocks(1, 20)).tolist() == [10, 10]


def test_one_block_has_no_interval() -> None:
    found = Bootstrap(cut_blocks(1, 3)).mean(np.array([1.0, 2.0, 3.0]))
    assert found.value == 2.0
    assert math.isnan(found.low) and math.isnan(found.high)


def test_block_means_give_the_mean() -> None:
    values = np.arange(12.0)
    assert Bootstrap(cut_blocks(3, 4)).block_means(values).tolist() == [1.5, 5.5, 9.5]


def test_intervals_cover_the_truth_of_correlated_tokens() -> None:
    """Neighbours share most of their value. An interval that took tokens for independent would cover a third."""
    rng = np.random.default_rng(5)
    block_of = cut_blocks(32, 100)
    bootstrap = Bootstrap(block_of, resamples=200)
    covered = {"mean": 0, "median": 0}
    trials = 100
    for _ in range(trials):
        values = np.repeat(rng.normal(2.0, 1.0, size=32 * 4), 25) + rng.normal(0, 0.5, size=3200)
        for name, found in (("mean", bootstrap.mean(values)), ("median", bootstrap.quantile(values, 0.5))):
            covered[name] += found.low <= 2.0 <= found.high
    assert all(0.87 <= count / trials <= 1 for count in covered.values()), covered


def test_the_seed_is_fixed() -> None:
    values = np.random.default_rng(0).normal(size=400)
    assert Bootstrap(cut_blocks(4, 100)).mean(values) == Bootstrap(cut_blocks(4, 100)).mean(values)
