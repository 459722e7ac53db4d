"""The suffix automaton against the definition of what it finds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.engine.speculation.repeats import Repeats

pytestmark = pytest.mark.unit


def longest_repeat(tokens: list[int]) -> int:
    count = len(tokens)
    for length in range(count - 1, 0, -1):
        if any(tokens[begin : begin + length] == tokens[count - length :] for begin in range(count - length)):
            return length
    return 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40) | st.lists(st.integers(0, 9), max_size=40))
def test_it_finds_the_longest_suffix_that_has_stood_before(tokens: list[int]) -> None:
    repeats = Repeats()
    for count, token in enumerate(tokens, 1):
        repeats.extend([token])
        read = tokens[:count]
        length = longest_repeat(read)
        assert repeats.match_length == length
        follows = list(repeats.continuation(4))
        if length == 0:
            assert follows == []
            continue
        suffix = read[count - length :]
        ends = [end for end in range(length, count) if read[end - length : end] == suffix]
        assert follows in [read[end : end + 4] for end in ends]


def test_the_latest_occurrence_is_taken() -> None:
    repeats = Repeats()
    repeats.extend([1, 2, 7, 9, 1, 2, 8, 9, 1, 2])
    assert list(repeats.continuation(2)) == [8, 9]
