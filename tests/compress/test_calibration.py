"""What is said about the text that a model is calibrated on."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.compress.calibration.samples import Calibration
from nybble.compress.calibration.text import DEFAULT_NAME, OWN_NAME

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("name", "method", "hint"),
    [(DEFAULT_NAME, "GPTQ", True), (DEFAULT_NAME, None, False), (OWN_NAME, "GPTQ", False), ("my.txt", "GPTQ", False)],
)
def test_coverage_counts_words_and_special_tokens(name: str, method: str | None, hint: bool) -> None:
    seen = Calibration(np.array([[0, 2, 3], [4, 4, 5]]), name, vocab_size=12, control_ids=frozenset({0, 1}))
    said = seen.coverage(method)
    assert said.startswith(f"calibrated on 2 x 3 tokens of {name}, which show 40% of the vocabulary and 1 of 2 special")
    assert ("GPTQ usually does better" in said and "--calibrate self" in said) is hint
