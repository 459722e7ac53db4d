"""`nybble convert`: the same weights in another container."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli.options import local_path
from nybble.cli.progress import Bar
from nybble.cli.quantize import show_report
from nybble.compress.convert.run import convert as run


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A GGUF file, a Hugging Face folder or a name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="What to write: a folder, or NAME.gguf.")],
    to: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="gguf, hf, gptq, awq, compressed-tensors. Default: gguf if DST ends so."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="With --to hf: f32, f16 or bf16 for all tensors, even if that rounds them."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
) -> None:
    """Write a model in another container. No value changes unless --dtype asks for it: every tensor is decoded from
    both and compared before DST gets its name. What the container cannot say exactly is refused."""
    began = time.perf_counter()
    with Bar() as progress:
        outcome = run(local_path(source), target, progress, to=to, dtype=dtype, force=force, dry_run=dry_run)
    show_report(
        outcome.report, "would be written" if dry_run else f"written in {time.perf_counter() - began:.1f} s", target
    )
    if outcome.proof is not None:
        print(outcome.proof.sentence())
