"""`nybble cp`: a second name for a model."""

from __future__ import annotations

from typing import Annotated

import typer

from nybble.store import Library


def cp(
    source: Annotated[str, typer.Argument(metavar="NAME", help="A model, as `nybble list` shows it.")],
    target: Annotated[str, typer.Argument(metavar="NEW", help="Its second name.")],
) -> None:
    """Give a model a second name. Its files are not copied."""
    Library().copy(source, target)
    print(f"copied {source} to {target}")
