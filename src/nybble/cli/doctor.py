"""`nybble doctor`: what this machine has, and what a model can reach on it at best."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nybble import __version__
from nybble.backends.cpu import best_isa, default_threads
from nybble.backends.device import gpu_names, gpu_problem
from nybble.cli.options import ThreadsOption, announce, local_path
from nybble.core import env
from nybble.engine.load import load_model
from nybble.engine.roofline import Roofline, measure_roofline
from nybble.engine.speculation.curve import CostCurve, measure_curve

SIZES = (0.135e9, 0.5e9, 1.5e9, 3e9, 8e9, 14e9)  # weights
BITS_PER_WEIGHT = 4.85  # of a Q4_K_M file, about
BATCHES = (1, 8)  # sequences of the cost curve
VARIABLES = ("NYBBLE_ISA", "NYBBLE_ACT", "NYBBLE_HOME")


def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Measure what steps of this model cost here as well.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Show the instruction set, threads and measured limits of this machine, and what they allow."""
    path = None if model is None else local_path(model)
    console = Console()
    chosen = threads or default_threads()
    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("nybble", f"{__version__}, Python {platform.python_version()}, numpy {version('numpy')}")
    forced = f" (NYBBLE_ISA; the best here is {best_isa()})" if env.isa() else ""
    facts.add_row("instruction set", f"{env.isa() or best_isa()}{forced}")
    facts.add_row("threads", f"{chosen} of {os.cpu_count()} processors")
    facts.add_row("memory", f"{_memory_gb():.1f} GB")
    problem = gpu_problem()
    facts.add_row("GPU", f"none: {problem}" if problem else ", ".join(gpu_names()))
    facts.add_row("models", str(env.home() / "models"))
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    facts.add_row("environment", ", ".join(variables) or "nothing set")
    roofline = measure_roofline(chosen)
    facts.add_row("read bandwidth", f"{roofline.read_gb_s:.1f} GB/s")
    facts.add_row("int8 peak", f"{roofline.int8_gops:.0f} Gop/s")
    console.print(facts)
    console.print(_limits(roofline))
    if path is not None:
        announce(f"measuring steps of {path.name}, which takes up to a minute")
        loaded = load_model(path, threads=threads, context=128)
        console.print(_curves(path.name, [measure_curve(loaded.model, batch) for batch in BATCHES]))


def _curves(name: str, curves: list[CostCurve]) -> Table:
    """c(k): speculation pays where it brings more tokens than this costs steps."""
    table = Table("k", title=f"c(k) of {name}: a step with k tokens of each sequence, against one with 1")
    for curve in curves:
        of = "1 sequence" if curve.num_sequences == 1 else f"{curve.num_sequences} sequences"
        table.add_column(f"{of}, ms", justify="right")
        table.add_column("c(k)", justify="right")
    for count in range(1, len(curves[0].seconds) + 1):
        cells = [(f"{curve.seconds[count - 1] * 1e3:.1f}", f"{curve.ratio(count):.2f}") for curve in curves]
        table.add_row(str(count), *(cell for pair in cells for cell in pair))
    return table


def _limits(roofline: Roofline) -> Table:
    table = Table("weights", title=f"At best, with {BITS_PER_WEIGHT} bits per weight (Q4_K_M)")
    for name in ("file", "prompt tok/s", "generated tok/s, one stream"):
        table.add_column(name, justify="right")
    for weights in SIZES:
        num_bytes = weights * BITS_PER_WEIGHT / 8
        prefill = roofline.int8_gops * 1e9 / (2 * weights)
        decode = roofline.read_gb_s * 1e9 / num_bytes
        table.add_row(f"{weights / 1e9:g} B", f"{num_bytes / 1e9:.2f} GB", f"{prefill:,.0f}", f"{decode:,.0f}")
    return table


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
