"""`nybble convert`: the same weights in another container."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli.options import local_path
from nybble.cli.progress import Bar
from nybble.cli.quantize import show_report
from nybble.compress.gguf.convert import to_gguf


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face folder.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="What to write: a name that ends in .gguf.")],
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
) -> None:
    """Write a Hugging Face folder as a GGUF file. No value changes: vectors become float32, matrices stay what they
    are."""
    began = time.perf_counter()
    with Bar() as progress:
        report = to_gguf(local_path(source), target, progress, force=force)
    show_report(report, f"written in {time.perf_counter() - began:.1f} s", target)
