"""Options that several commands share, and how a model argument becomes a path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nybble.store import resolve

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A GGUF file, a Hugging Face folder, or a name (smollm2:135m, hf.co/...)."),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads to compute with; by default the cores that this process may use.")
]

SpeculateOption = Annotated[
    str, typer.Option(help="Compute guessed tokens along: auto (where it pays), ngram (always), off. Same text.")
]

KvCacheTypeOption = Annotated[
    str, typer.Option(help="Keys and values in f16, or in int8: twice as many tokens in the same memory.")
]


def local_path(model: str) -> Path:
    """The path of a model, fetched first if it has a name and is not here yet.

    Raises:
        ModelNotFoundError: there is no such file, folder or name.
        StoreError: it could not be fetched.
    """
    return resolve(model, announce=announce)


def announce(message: str) -> None:
    """Say something on standard error before something slow starts."""
    print(message, file=sys.stderr, flush=True)
