"""The bar of long work."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from nybble.cli.progress import Bar

pytestmark = [pytest.mark.unit]


def test_a_second_bar_takes_the_place_of_the_first() -> None:
    """Some work has several parts with a bar each, and a console shows one."""
    bar = Bar()
    bar._console = Console(file=io.StringIO(), force_terminal=True)
    with bar:
        bar.start(10)
        first = bar._bar
        bar.advance(10, "text")
        bar.start(20)
        assert first is not None and bar._bar is not first
        assert not first.live.is_started and bar._bar is not None and bar._bar.live.is_started
    assert not bar._bar.live.is_started
