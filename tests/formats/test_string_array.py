"""Arrays of strings: found where they lie, whatever their lengths, and the same strings however they are asked for."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from nybble.formats import string_array
from nybble.formats.string_array import StringArray, find_ends

pytestmark = pytest.mark.unit


def packed(strings: list[bytes]) -> bytes:
    return b"".join(struct.pack("<Q", len(s)) + s for s in strings)


def array(strings: list[bytes], after: bytes = b"") -> StringArray:
    view = memoryview(packed(strings) + after)
    ends = find_ends(view, 0, len(strings))
    assert len(ends) == len(strings)
    return StringArray(view[: int(ends[-1]) if len(ends) else 0], ends)


CASES = {
    "none": [],
    "plain": [b"a", b"bc", "Größe".encode(), b"\xe2\x96\x81the"],
    "empty ones": [b"", b"a", b"", b"", b"b", b""],
    "long ones": [b"a" * 255, b"b" * 256, b"c" * 300, b"d", b"e" * 65536, b"f"],
    "NUL inside": [b"\0", b"a\0\0\0\0\0\0\0\0b", b"\0\0\0\0\0\0\0\0", b"c"],
    "looks like a head": [b"\x03\0\0\0\0\0\0\0abc", b"d"],
    "broken UTF-8": [b"\xff", b"\xe2\x96", b"\x81a"],
}


@pytest.mark.parametrize("case", CASES)
def test_every_string_is_found(case: str) -> None:
    strings = array(CASES[case], after=b"\x01\0\0\0\0\0\0\0z")
    expected = [s.decode("utf-8", "replace") for s in CASES[case]]
    assert list(strings) == expected
    assert [strings[i] for i in range(len(expected))] == expected
    assert strings == expected
    assert strings != [*expected, "x"]
    assert strings[1:] == expected[1:]


def test_indices_are_those_of_a_list() -> None:
    strings = array([b"a", b"b", b"c"])
    assert (strings[-1], strings[-3], strings[::-1]) == ("c", "a", ["c", "b", "a"])
    for index in (3, -4):
        with pytest.raises(IndexError):
            strings[index]
    assert "b" in strings
    assert strings.index("c") == 2


@pytest.mark.parametrize("window", [8, 17, 64, 1 << 18])
def test_windows_meet_anywhere(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(string_array, "_WINDOW_BYTES", window)
    monkeypatch.setattr(string_array, "_RUN", 7)
    draw = random.Random(window)
    kinds = (lambda: 0, lambda: draw.randrange(1, 20), lambda: draw.randrange(250, 600))
    for _ in range(40):
        weights = draw.choice([(0, 1, 0), (1, 5, 1), (1, 1, 1)])
        strings = [bytes(draw.choices(b"abc\0", k=draw.choices(kinds, weights)[0]())) for _ in range(60)]
        assert list(array(strings)) == [s.decode() for s in strings]


@pytest.mark.parametrize("length", [1, 100, 256, 2**31, 2**63, 2**64 - 1])
@pytest.mark.parametrize("before", [0, 3, 40_000])
def test_a_string_that_passes_the_end_ends_the_search(length: int, before: int) -> None:
    data = packed([b"abc"] * before) + struct.pack("<Q", length)
    ends = find_ends(memoryview(data), 0, before + 5)
    np.testing.assert_array_equal(ends, 11 * np.arange(1, before + 1))


def test_a_cut_head_ends_the_search() -> None:
    for cut in range(1, 9):
        assert len(find_ends(memoryview(packed([b"abc", b"de"])[: 11 + 8 - cut]), 0, 2)) == 1
