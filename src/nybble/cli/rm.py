"""`nybble rm`: forget models."""

from __future__ import annotations

from typing import Annotated

import typer

from nybble.store import Library


def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names, as `nybble list` shows them.")],
) -> None:
    """Remove models, and their files where no other model uses them."""
    library = Library()
    for name in names:
        library.remove(name)
        print(f"removed {name}")
