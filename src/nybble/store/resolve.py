"""From what a user typed to a file or folder on this machine."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from nybble.core.env import home
from nybble.core.errors import ModelNotFoundError
from nybble.store.catalog import CatalogEntry, catalog
from nybble.store.packages import fetch, is_complete


def resolve(name_or_path: str | Path, *, announce: Callable[[str], None] = lambda message: None) -> Path:
    """The path of a model: an existing file or folder as it is, a catalog name after fetching it if need be.

    Args:
        name_or_path: a path, or a name of the catalog.
        announce: told in one line before something slow starts.

    Raises:
        ModelNotFoundError: it is neither.
        StoreError: the model could not be fetched or stored.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    entry = catalog().get(str(name_or_path))
    if entry is None:
        raise ModelNotFoundError(_not_found(str(name_or_path)))
    return _local(entry, announce)


def _local(entry: CatalogEntry, announce: Callable[[str], None]) -> Path:
    target = home() / "models" / entry.file_name
    if not is_complete(entry, target):
        fetch(entry, target, announce)
    return target


def _not_found(name: str) -> str:
    names = sorted(catalog())
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return f"no file or folder {name!r}, and no model of that name in the catalog{hint} It has: {', '.join(names)}"
