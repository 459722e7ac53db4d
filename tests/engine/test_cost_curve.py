"""The cost of a step by its number of tokens."""

from __future__ import annotations

from itertools import count

import pytest
from rich.console import Console

from fakes import FakeModel
from nybble.cli.doctor import _curves
from nybble.engine.speculation.curve import CostCurve, measure_curve

pytestmark = pytest.mark.unit


def test_every_size_is_run_for_all_sequences() -> None:
    model, ticks = FakeModel(), count()
    curve = measure_curve(model, 3, longest=5, rounds=2, clock=lambda: float(next(ticks)))
    assert curve == CostCurve(3, (1.0,) * 5)
    assert [len(step.token_ids) for step in model.steps] == [3 * 64, *[3, 6, 9, 12, 15] * 2]
    assert all(len(step.logit_rows) == len(step.token_ids) for step in model.steps[1:])
    assert CostCurve(1, (2.0, 3.0)).ratio(2) == 1.5


def test_the_doctor_shows_the_curves(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=100).print(_curves("m.gguf", [CostCurve(1, (0.01, 0.0125)), CostCurve(8, (0.02, 0.03))]))
    text = capsys.readouterr().out
    assert "c(k) of m.gguf" in text
    assert "1 sequence, ms" in text and "8 sequences, ms" in text
    assert all(number in text for number in ("12.5", "1.25", "30.0", "1.50"))
