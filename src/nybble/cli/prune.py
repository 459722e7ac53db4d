"""`nybble prune`: a model with weights set to zero, or with fewer layers, neurons or heads."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.cli.options import ThreadsOption, local_path
from nybble.cli.progress import Bar
from nybble.compress.stage import parse_options
from nybble.core.errors import ConfigError


def prune(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face folder, a GGUF file or a catalog name.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="What to write: a folder, or NAME.gguf.")],
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="Set weights to zero by magnitude, wanda or sparsegpt.")
    ] = None,
    amount: Annotated[float | None, typer.Option(help="The share of each linear that becomes zero.")] = None,
    nm: Annotated[str | None, typer.Option(metavar="N:M", help="So many of so many inputs stay: 2:4, 4:8.")] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="SCOPE", help="layer: the same share everywhere (the default); global: where it hurts least."
        ),
    ] = None,
    drop_layers: Annotated[
        float | None, typer.Option(metavar="N", help="Take so many layers, or this share, out.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT", help="With --drop-layers: influence (the default), or loss, which is slower and better."
        ),
    ] = None,
    ffn_width: Annotated[float | None, typer.Option(metavar="SHARE", help="Feed-forward neurons that stay.")] = None,
    heads: Annotated[float | None, typer.Option(metavar="SHARE", help="Query heads of each group that stay.")] = None,
    kv_groups: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Groups that stay: keys and values with their query heads.")
    ] = None,
    compensate: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="What makes up for neurons and heads: refit (the default), bias or none."),
    ] = None,
    round_to: Annotated[int | None, typer.Option(help="Neurons are a multiple of it. Default: 32.")] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|DATASET|self",
            help="Text to look at: a file, a `datasets` name, or self, which the model writes. Default: Python's docs.",
        ),
    ] = None,
    calibration_samples: Annotated[int | None, typer.Option(min=1, help="How many samples of it.")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(min=8, help="Tokens per sample.")] = None,
    threads: ThreadsOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DST if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
) -> None:
    """Write a pruned model. Zeros (--method) make no file smaller by themselves; fewer layers (--drop-layers), neurons
    (--ffn-width) and heads (--heads, --kv-groups) make it smaller and faster. See docs/prune.md."""
    given: Mapping[str, object] = {
        "method": method,
        "amount": amount,
        "nm": nm,
        "scope": scope,
        "drop_layers": drop_layers,
        "by": by,
        "ffn_width": ffn_width,
        "heads": heads,
        "kv_groups": kv_groups,
        "compensate": compensate,
        "round_to": round_to,
        "calibrate": calibrate,
        "calibration_samples": calibration_samples,
        "calibration_tokens": calibration_tokens,
        "threads": threads,
    }
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("nybble prune needs PyTorch: pip install 'nybble[compress]'")
    options_of: Any = importlib.import_module("nybble.compress.prune.options").PruneOptions
    options = parse_options(
        options_of, {name: value for name, value in given.items() if value is not None}, where="nybble prune"
    )
    run: Any = importlib.import_module("nybble.compress.prune.run")
    path = local_path(source)
    if dry_run:
        _show_prediction(run.predict(path, target, options), target)
        return
    began = time.perf_counter()
    with Bar() as progress:
        result = run.run_prune(path, target, options, progress=progress, resume=resume, force=force)
    figures = result.figures
    before, after = (int(str(figures[f"parameters_{when}"])) for when in ("before", "after"))
    for name, value in figures.items():
        if not name.startswith(("parameters_", "bytes_")):
            print(f"{name.replace('_', ' ')}: {_text(value)}")
    print(
        f"{target}: {after / 1e6:.1f} M parameters instead of {before / 1e6:.1f} M, "
        f"{int(str(figures['bytes_after'])) / 1e6:.1f} MB; written in {time.perf_counter() - began:.1f} s"
    )


def _show_prediction(expected: Any, target: Path) -> None:
    about = "" if expected.exact else "about "
    print(
        f"{target}: {about}{expected.weights_after / 1e6:.1f} M parameters instead of "
        f"{expected.weights_before / 1e6:.1f} M, {about}{expected.target_bytes / 1e6:.1f} MB; would be written"
    )


def _text(value: object) -> str:
    if isinstance(value, list):
        return " ".join(_text(one) for one in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
