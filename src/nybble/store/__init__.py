"""Models on this machine: names, the files they stand for, and where they come from.

What makes and downloads models is imported when it is asked for: who only runs one does not wait for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nybble.store.catalog import CatalogEntry, catalog
from nybble.store.manifest import StoredModel
from nybble.store.modelfile import ModelfileError
from nybble.store.names import ModelName
from nybble.store.progress import PullProgress
from nybble.store.resolve import existing, resolve, stored

if TYPE_CHECKING:
    from nybble.store.go_template import GoTemplate
    from nybble.store.library import Library
    from nybble.store.template import is_go_template

_LATE = {"GoTemplate": "go_template", "Library": "library", "is_go_template": "template"}

__all__ = [
    "CatalogEntry",
    "GoTemplate",
    "Library",
    "ModelName",
    "ModelfileError",
    "PullProgress",
    "StoredModel",
    "catalog",
    "existing",
    "is_go_template",
    "resolve",
    "stored",
]


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
