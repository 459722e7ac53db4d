"""`nybble quantize`: a model with fewer bits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nybble.cli.options import ThreadsOption, local_path
from nybble.cli.progress import Bar
from nybble.compress import table
from nybble.compress.methods import QuantizeReport, QuantizeRequest, find, names
from nybble.core.errors import ConfigError


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face folder, a GGUF file or a catalog name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="What to write.")],
    to: Annotated[str, typer.Option("--to", metavar="TYPE", help="The type, for example Q4_K_M; see below.")],
    imatrix: Annotated[
        Path | None, typer.Option(help="An importance matrix: which inputs matter (see `nybble imatrix`).")
    ] = None,
    tensor: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX=TYPE", help="Another type for tensors whose name it is found in; repeatable."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|DATASET|self",
            help="Text that gptq, awq and int types look at: a file, a `datasets` name, or self, which the model "
            "writes. Default: Python's own docs.",
        ),
    ] = None,
    calibration_samples: Annotated[int | None, typer.Option(min=1, help="How many samples of it.")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(min=8, help="Tokens per sample.")] = None,
    group_size: Annotated[int | None, typer.Option(min=-1, help="Inputs per scale; -1 for a whole row.")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Without or with zero points of groups.")
    ] = None,
    clip_search: Annotated[
        bool | None, typer.Option("--clip-search/--no-clip-search", help="Look for the best range of each group.")
    ] = None,
    desc_act: Annotated[
        bool | None, typer.Option("--desc-act/--no-desc-act", help="gptq: groups in order of importance (g_idx).")
    ] = None,
    damp_percent: Annotated[
        float | None,
        typer.Option(
            help="gptq: what is added to the Hessian's diagonal, in units of its mean. More trusts the text less."
        ),
    ] = None,
    double_quant: Annotated[
        bool | None, typer.Option("--double-quant/--no-double-quant", help="nf4 and fp4: 8-bit scales.")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write quantization_report.json: the error of each linear.")
    ] = False,
    threads: ThreadsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
) -> None:
    path = local_path(source)
    options = {
        "calibrate": calibrate,
        "calibration_samples": calibration_samples,
        "calibration_tokens": calibration_tokens,
        "group_size": group_size,
        "symmetric": symmetric,
        "clip_search": clip_search,
        "desc_act": desc_act,
        "damp_percent": damp_percent,
        "double_quant": double_quant,
        "report": report or None,
    }
    request = QuantizeRequest(
        source=path,
        target=target,
        method=find(to, target),
        imatrix=imatrix,
        tensors=tuple(_override(one) for one in tensor or ()),
        threads=threads,
        force=force,
        dry_run=dry_run,
        options={name: value for name, value in options.items() if value is not None},
    )
    began = time.perf_counter()
    with Bar() as progress:
        outcome = request.method.run(request, progress)
    show_report(outcome, "would be written" if dry_run else f"written in {time.perf_counter() - began:.1f} s", target)


quantize.__doc__ = f"""Write a model in another type.

Types: {", ".join(names())}. docs/quantise.md and docs/quantise-safetensors.md say what each is good for.
"""
assert table  # imported for what it registers


def _override(text: str) -> tuple[str, str]:
    pattern, separator, name = text.rpartition("=")
    if not separator or not pattern or not name:
        raise ConfigError(f"--tensor takes REGEX=TYPE, for example 'ffn_down=Q6_K', not {text!r}")
    return pattern, name


def show_report(report: QuantizeReport, what: str, target: Path) -> None:
    """A table of types, and the size before and after."""
    rows = Table("type")
    for column in ("tensors", "MB"):
        rows.add_column(column, justify="right")
    for name, (count, size) in sorted(report.by_type.items(), key=lambda item: -item[1][1]):
        rows.add_row(name, str(count), f"{size / 1e6:.1f}")
    console = Console()
    console.print(rows)
    share = report.target_bytes / report.source_bytes if report.source_bytes else 1.0
    line = f"{target}: {report.target_bytes / 1e6:.1f} MB, {share:.1%} of the source, {report.bpw:.2f} bits per weight"
    memory = f", up to {report.peak_bytes / 1e6:.0f} MB of memory for tensors" if what.startswith("would") else ""
    console.print(f"{line}; {what}{memory}", markup=False, highlight=False, soft_wrap=True)
