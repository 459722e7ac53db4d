"""`nybble eval`: what a smaller model lost."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nybble.cli.options import ThreadsOption, announce
from nybble.cli.progress import Bar
from nybble.core.errors import ConfigError
from nybble.evaluate.compare import evaluate
from nybble.evaluate.html import to_html
from nybble.evaluate.pareto import draw
from nybble.evaluate.picture import check_pillow, to_png
from nybble.evaluate.report import Report
from nybble.evaluate.table import Cell, cells, columns
from nybble.formats.output import OutputFile, refuse_existing

_LEAST_WIDTH = 160  # of the table where there is no terminal


def eval(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="GGUF files, Hugging Face folders, or names (smollm2:135m).")
    ],
    text: Annotated[Path, typer.Option("--text", help="What they read: a file in UTF-8, not one calibrated on.")],
    against: Annotated[
        str | None, typer.Option(metavar="REFERENCE", help="Compare with this model: KL divergence, agreement, flips.")
    ] = None,
    ctx: Annotated[int, typer.Option(help="Tokens of a window; the second half of each is scored.")] = 512,
    tokens: Annotated[int | None, typer.Option(help="Read so many tokens of the text; by default all.")] = None,
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with the table and a picture.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Write size against loss as a picture; needs Pillow.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILEs that exist.")] = False,
) -> None:
    """Perplexity of models on a text, and how far they lie from what they were made of."""
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise ConfigError(f"--plot {plot} writes a PNG: let the name end in .png")
        if len(models) < 2:
            raise ConfigError("--plot shows several models beside each other: name at least two")
        check_pillow()
    for path in (html, plot):
        if path is not None:
            refuse_existing(path, force=force)
    with ExitStack() as stack:
        # Opened first: what cannot be written is known before an hour of work. They get their names at the end.
        files = [stack.enter_context(OutputFile(path, force=force)) if path else None for path in (html, plot)]
        with Bar() as progress:
            report = evaluate(
                models,
                text,
                reference=against,
                ctx=ctx,
                tokens=tokens,
                threads=threads,
                progress=progress,
                announce=announce,
            )
        if files[0] is not None:
            files[0].write(to_html(report).encode())
        if files[1] is not None:
            files[1].write(to_png(draw(report)))
    show(report)
    if as_json:
        print(json.dumps(report.to_json(), allow_nan=False), flush=True)


def show(report: Report) -> None:
    """The table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, _LEAST_WIDTH))
    caption = f"{report.conditions.sentence()} After ±: half the width of the interval."
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns(report)):
        table.add_column(name, justify="right" if number else "left")
    for row in cells(report):
        table.add_row(*(_text(cell) for cell in row))
    console.print(table)
    console.print(caption, style="dim", markup=False, highlight=False)


def _text(cell: Cell) -> Text:
    text = Text(cell.value)
    return text.append(f" ±{cell.margin}", style="dim") if cell.margin else text
