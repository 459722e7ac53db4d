"""`nybble compress`: a recipe of stages, and one report about all of them."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from nybble.cli.options import ThreadsOption, local_path
from nybble.cli.progress import Bar
from nybble.core.errors import ConfigError

_LEAST_WIDTH = 160  # of the table where there is no terminal


def compress(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face folder, a GGUF file or a catalog name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="What to write: a folder, or NAME.gguf.")],
    recipe: Annotated[str, typer.Option("--recipe", metavar="FILE|NAME", help="What to do; see docs/compress.md.")],
    text: Annotated[
        Path | None, typer.Option("--text", help="What the report measures on, instead of the recipe's text.")
    ] = None,
    threads: ThreadsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace DST if it exists, and unfinished work for it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only read the recipe and say what it would do.")] = False,
) -> None:
    """Make a model smaller in stages: prune, distil, qat, quantise. Ready recipes: narrow-q8, shallow-q4, trained-q2.
    DST.report gets a page and a JSON file: before and after every stage parameters, bytes, perplexity, KL divergence
    and tokens per second."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("nybble compress needs PyTorch: pip install 'nybble[compress]'")
    plan: Any = importlib.import_module("nybble.compress.recipe.plan")
    run: Any = importlib.import_module("nybble.compress.recipe.run")
    steps = plan.load_recipe(plan.find_recipe(recipe))
    if text is not None:
        steps = steps.measured_on(text)
    path = local_path(source)
    if dry_run:
        for stage, name in zip(steps.stages, steps.targets(path, target), strict=True):
            said = ", ".join(f"{key} {value}" for key, value in run.said(stage).items())
            print(f"{name}: {said or 'as by default'}")
        return
    with Bar() as progress:
        done = run.compress(path, target, steps, progress=progress, resume=resume, force=force, threads=threads)
    _show(done)


def _show(done: Any) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, _LEAST_WIDTH))
    names, rows = done.report.table()
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(f"{cell.value} ±{cell.margin}" if cell.margin else cell.value for cell in row))
    console.print(table)
    print(done.report.measured.quality.conditions.sentence())
    print(f"{done.target}, report: {done.report_folder / 'report.html'}")
