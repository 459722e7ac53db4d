"""`nybble imatrix`: which inputs of a model's matrices matter."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.checkpoint import open_checkpoint
from nybble.cli.options import ModelArgument, local_path
from nybble.cli.progress import Bar
from nybble.compress.calibration.own_text import own_texts
from nybble.compress.calibration.text import OWN_NAME, SELF
from nybble.compress.gguf.write import check_target
from nybble.compress.safetensors.options import DEFAULT_SAMPLES
from nybble.core.errors import ConfigError


def imatrix(
    model: ModelArgument,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="FILE|self",
            help="Calibration text: like what the model will read. self: the model writes it.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="What to write: a name that ends in .gguf.")],
    ctx: Annotated[int, typer.Option(help="Tokens of each window of the text.")] = 512,
    chunks: Annotated[
        int | None, typer.Option(min=1, help="Windows to read; by default all of a file, 128 of self.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
) -> None:
    """Collect an importance matrix for `nybble quantize --imatrix`, in llama.cpp's GGUF format."""
    path = local_path(model)
    check_target(path, output, force=force)
    collecting = _needs_torch("nybble.compress.gguf.collect")
    began = time.perf_counter()
    with Bar() as progress:
        checkpoint = open_checkpoint(path)
        collecting.check_window(checkpoint, ctx)  # before the model writes for minutes
        if text == SELF:
            chunks = chunks or DEFAULT_SAMPLES
            words, name = "\n\n".join(own_texts(path, chunks * ctx, progress)), OWN_NAME
        else:
            words, name = _read(Path(text)), Path(text).name
        windows = collecting.calibration_windows(checkpoint, words, ctx=ctx, chunks=chunks)
        matrix = collecting.collect(checkpoint, windows, progress, dataset=name)
        matrix.write(output, force=force)
    seconds = time.perf_counter() - began
    print(f"{output}: {len(matrix.entries)} matrices, {len(windows)} windows of {ctx} tokens; {seconds:.1f} s")


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError as e:
        raise ConfigError(f"--text {path} cannot be read: {e.strerror}") from e


def _needs_torch(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        raise ConfigError("collecting an importance matrix needs torch: pip install 'nybble[compress]'") from None
