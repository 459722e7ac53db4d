"""What the log says while a model is quantised on its way into memory."""

from __future__ import annotations

import logging

import pytest

from nybble.compress import on_load


def test_long_work_is_told_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr(on_load.time, "monotonic", lambda: now[0])
    progress = on_load.LoggedProgress("int4")
    with caplog.at_level(logging.INFO, logger="nybble"):
        progress.start(1000)
        for _ in range(4):
            now[0] += 3.0
            progress.advance(100, "a tensor")
        progress.note("groups have 64 inputs")
    assert caplog.messages == [
        "quantising to int4: 20 %, about 24 s left",
        "quantising to int4: 40 %, about 18 s left",
        "groups have 64 inputs",
    ]
