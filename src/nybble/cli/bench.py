"""`nybble bench`: how fast a model runs here."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nybble.cli.options import ModelArgument, ThreadsOption, local_path
from nybble.core.errors import ConfigError
from nybble.engine.load import load_model
from nybble.engine.roofline import DEFINITION, Roofline, measure_roofline
from nybble.evaluate.speed import SpeedResult, measure, plan, report


def bench(
    model: ModelArgument,
    prompt_tokens: Annotated[int, typer.Option("-p", "--prompt-tokens", help="Tokens of each prompt; 0: none.")] = 512,
    new_tokens: Annotated[int, typer.Option("-n", "--new-tokens", help="Tokens generated after 128; 0: none.")] = 64,
    batches: Annotated[str, typer.Option("-b", "--batches", help="Sequences at once, with commas.")] = "1",
    threads: ThreadsOption = None,
    repeat: Annotated[int, typer.Option(help="Measurements of each cell, after a warm-up.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line.")] = False,
) -> None:
    tests = plan(prompt_tokens, new_tokens, _numbers(batches))
    path = local_path(model)
    loaded = load_model(path, threads=threads, context=max(test.context for test in tests))
    before = measure_roofline(threads)
    results = measure(loaded, tests, roofline=before, repeat=repeat, progress=_progress)
    _show(results, before, f"{path.name}, {loaded.model.threads} threads, {loaded.model.isa}")
    if as_json:
        print(json.dumps(report(loaded, path.name, before, results)), flush=True)


bench.__doc__ = f"""Measure how fast a model reads prompts (pp) and generates (tg).

pp512@b8 reads 8 prompts of 512 tokens; tg64@b8 generates 64 tokens on each of 8 sequences at once, after prompts of
128 tokens. Figures are medians, over all sequences together. {DEFINITION}
"""


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--batches takes whole numbers with commas, such as 1,8,32, not {text!r}") from None


def _progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def _show(results: list[SpeedResult], roofline: Roofline, title: str) -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    table = Table("test", title=title)
    for column in ("tok/s", "min", "max", "of the roofline"):
        table.add_column(column, justify="right")
    for result in results:
        spread = result.tok_s
        numbers = [f"{value:.1f}" for value in (spread.median, spread.min, spread.max)]
        table.add_row(result.test, *numbers, f"{result.roofline_fraction:.0%}")
    table.caption = f"read {roofline.read_gb_s:.1f} GB/s, int8 {roofline.int8_gops:.0f} Gop/s"
    Console().print(table)
