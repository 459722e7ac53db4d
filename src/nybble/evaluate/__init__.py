"""Measurements with one definition each.

`from nybble.evaluate import evaluate` is the way in from Python; it is imported when it is asked for, because the
measurements of speed need none of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nybble.evaluate.compare import evaluate
    from nybble.evaluate.report import Report

__all__ = ["Report", "evaluate"]

_HOMES = {"evaluate": "compare", "Report": "report"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
