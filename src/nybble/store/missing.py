"""The sentence for a name that nothing has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from nybble.store.catalog import catalog


def not_found(name: str, here: Iterable[str]) -> str:
    """What was not found, what comes close, and what there is. here: names of models on this machine."""
    names = sorted(catalog())
    close = difflib.get_close_matches(name, [*names, *here], n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return (
        f"no file or folder {name!r}, and no model of that name here or in the catalog{hint} It has: {', '.join(names)}"
    )
