"""`nybble store`: look after the files of all models."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from nybble.cli.list import size_text
from nybble.core.errors import StoreError
from nybble.store import Library


class Action(StrEnum):
    """What to do with the store."""

    verify = "verify"
    gc = "gc"


def store(
    action: Annotated[
        Action, typer.Argument(help="verify: read every file and check it. gc: delete what no model uses.")
    ],
) -> None:
    """Check the files of the models, or delete those that no model uses."""
    library = Library()
    if action is Action.gc:
        count, freed = library.collect()
        print(f"{count} files were not used; {size_text(freed)} are free now")
        return
    wrong = library.verify(lambda digest: print(f"reading {digest[:19]}", file=sys.stderr, flush=True))
    for sentence in wrong:
        print(sentence)
    if wrong:
        raise StoreError(f"{library.root}: {len(wrong)} thing{'s' * (len(wrong) > 1)} to mend, see above")
    print(f"{library.root}: all files are what they should be")
