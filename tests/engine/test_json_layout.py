"""JsonLayout: white space guessed from what stood before, in the ways in which models lay JSON out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nybble.engine.json_layout import JsonLayout

VALUE = {"people": [{"name": 'A "b" {', "age": 3, "tags": []}, {"name": "C,", "age": 4, "tags": [1, 2]}], "n": {}}
STYLES: dict[str, dict[str, Any]] = {
    "one line": {},
    "compact": {"separators": (",", ":")},
    "two spaces": {"indent": 2},
    "four spaces": {"indent": 4},
    "tabs": {"indent": "\t"},
}


def gaps_missed(text: str) -> int:
    """How many gaps between two parts are guessed wrongly, the one after the first bracket not counted."""
    layout, data, count = JsonLayout(), text.encode(), 0
    at = 0
    while at < len(data):
        if layout.in_string:
            layout.feed(data[at : at + 1])
            at += 1
            continue
        end = at
        while end < len(data) and data[end] in b" \t\n\r":
            end += 1
        if at > 1 and end < len(data) and layout.gap(data[end]) not in (data[at:end], None):
            count += 1
        layout.feed(data[at : end + 1])
        at = end + 1
    return count


@pytest.mark.parametrize("style", STYLES)
def test_layouts_are_guessed_as_they_are(style: str) -> None:
    text = json.dumps(VALUE, **STYLES[style])
    assert gaps_missed(text) == (style == "compact")  # which shows at the first colon only


def test_the_rest_of_a_gap_that_has_begun() -> None:
    layout = JsonLayout()
    layout.feed(b'{\n    "a": 1,\n  ')
    assert layout.gap(ord('"')) == b"  "
    layout.feed(b"       ")  # more than expected: that was all
    assert layout.gap(ord('"')) == b""


def test_nothing_is_guessed_inside_a_string_or_of_the_first_gap() -> None:
    layout = JsonLayout()
    layout.feed(b"{")
    assert layout.gap(ord('"')) is None
    layout.feed(b'"a\\"')
    assert layout.in_string and layout.gap(ord(":")) is None
    layout.feed(b'"')
    assert not layout.in_string and layout.gap(ord(":")) == b""


def test_an_odd_layout_is_learnt() -> None:
    layout = JsonLayout()
    layout.feed(b'{"a" :1 ,"b"')
    assert layout.gap(ord(":")) == b" "
    layout.feed(b" :2")
    assert layout.gap(ord(",")) == b" "


def test_a_copy_goes_on_by_itself() -> None:
    layout = JsonLayout()
    layout.feed(b'{"a":1, ')
    other = layout.copy()
    other.feed(b'"b":2,\n"c"')
    layout.feed(b'"b":2,')
    assert layout.gap(ord('"')) == b" "


def test_brackets_without_end_keep_no_memory() -> None:
    layout = JsonLayout()
    layout.feed(b"[" * 100_000 + b"}" * 200_000 + b"[ 1")
    assert len(layout._seen) < 200
