"""Sampling parameters are checked when they are made."""

from __future__ import annotations

from typing import Any

import pytest

from nybble.core.errors import ConfigError
from nybble.core.sampling import SamplingParams

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"seed": -1},
        {"seed": 2**64},
        {"max_tokens": 0},
        {"logprobs": -1},
        {"logprobs": 101},
        {"stop": ("a", "")},
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(values))} must be"):
        SamplingParams(**values)


def test_the_edges_are_allowed() -> None:
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, seed=0, max_tokens=1, logprobs=0)
    SamplingParams(min_p=1, seed=2**64 - 1, max_tokens=None, logprobs=100, stop=("x",))
