"""The work of steps, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.backends.cpu import Step
from nybble.engine.meter import StepMeter, Work, fraction
from nybble.engine.roofline import ModelCost

pytestmark = pytest.mark.unit

COST = ModelCost(weight_bytes=1000, linear_weights=70, head_weights=30, kv_layers=((4, None), (4, None), (6, 16)))


def step(pieces: list[tuple[int, int]], rows: int) -> Step:
    counts = [count for _, count in pieces]
    return Step(
        token_ids=np.zeros(sum(counts), np.int32),
        cu_seqlens_q=np.cumsum([0, *counts]).astype(np.int32),
        context_lens=np.array([before for before, _ in pieces], np.int32),
        block_tables=np.zeros((len(pieces), 1), np.int32),
        logit_rows=np.arange(rows, dtype=np.int32),
    )


def test_a_step_reads_the_weights_once_and_each_context() -> None:
    meter = StepMeter(COST)
    meter.add(step([(20, 1), (0, 5)], rows=1), 0.5)
    assert meter.work == Work(0.5, 1000 + 8 * (21 + 5) + 6 * (16 + 5), 2 * (70 * 6 + 30))
    before = meter.work
    meter.add(step([(21, 1)], rows=1), 0.25)
    assert meter.work.num_bytes - before.num_bytes == 1000 + 8 * 22 + 6 * 16
    by_bytes = fraction(before, meter.work, read_gb_s=1e-5, int8_gops=1.0)
    assert by_bytes == pytest.approx((1000 + 8 * 22 + 6 * 16) / 0.25 / 1e4)
    assert fraction(before, meter.work, read_gb_s=1.0, int8_gops=1e-6) == pytest.approx(2 * 100 / 0.25 / 1e3)


def test_without_a_cost_only_time_is_kept() -> None:
    meter = StepMeter(None)
    meter.add(step([(0, 3)], rows=0), 0.5)
    assert meter.work == Work(0.5)
    assert fraction(Work(), Work(), 1.0, 1.0) == 0.0
