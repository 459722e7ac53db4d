"""`nybble doctor`: what this machine has, and what a model can reach on it at best."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

from rich.console import Console
from rich.table import Table

from nybble import __version__
from nybble.backends.cpu import best_isa, default_threads
from nybble.cli.options import ThreadsOption
from nybble.core import env
from nybble.engine.roofline import Roofline, measure_roofline

SIZES = (0.135e9, 0.5e9, 1.5e9, 3e9, 8e9, 14e9)  # weights
BITS_PER_WEIGHT = 4.85  # of a Q4_K_M file, about
VARIABLES = ("NYBBLE_ISA", "NYBBLE_ACT", "NYBBLE_HOME")


def doctor(threads: ThreadsOption = None) -> None:
    """Show the instruction set, threads and measured limits of this machine, and what they allow."""
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
    facts.add_row("models", str(env.home() / "models"))
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    facts.add_row("environment", ", ".join(variables) or "nothing set")
    roofline = measure_roofline(chosen)
    facts.add_row("read bandwidth", f"{roofline.read_gb_s:.1f} GB/s")
    facts.add_row("int8 peak", f"{roofline.int8_gops:.0f} Gop/s")
    console.print(facts)
    console.print(_limits(roofline))


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
