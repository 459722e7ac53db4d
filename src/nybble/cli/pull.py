"""`nybble pull`: fetch a model by name."""

from __future__ import annotations

from typing import Annotated

import typer

from nybble.cli.download import DownloadBar
from nybble.store import Library


def pull(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A name of the catalog (smollm2:135m), or hf.co/ORG/REPO[:FILE or TYPE]."),
    ],
) -> None:
    """Fetch a model. What came before an interruption is kept, and the next attempt goes on from there."""
    with DownloadBar() as bar:
        model = Library().pull(name, bar.tell)
    print(f"{model.name} is here, {model.size / 1e6:.1f} MB")
