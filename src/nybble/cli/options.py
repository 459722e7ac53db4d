"""Options that several commands share, and how a model argument becomes a path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from nybble.core.errors import ConfigError
from nybble.engine.options import parse_bytes, parse_prefix_cache_file
from nybble.engine.speculation.mode import parse_mode
from nybble.store import resolve

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A GGUF file, a Hugging Face folder, or a name (smollm2:135m, hf.co/...)."),
]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="Threads to compute with; by default the cores that this process may use.")
]

SpeculateOption = Annotated[
    str | None,
    typer.Option(
        help="Compute guessed tokens along: auto (the default; where it pays), ngram (always), off, or "
        "draft=MODEL[,k=N] with a draft model, a smaller one or self:TYPE. Same text."
    ),
]

KvCacheTypeOption = Annotated[
    str,
    typer.Option(
        help="Keys and values in f16, or in int8 (on a GPU fp8 as well): twice as many tokens in the same memory."
    ),
]

DeviceOption = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:N, torch-cpu, or auto: a GPU if one can be used, else the CPU (docs/gpu.md)."),
]
DtypeOption = Annotated[str, typer.Option(help="Of a GPU's computation: auto, bfloat16, float16 or float32.")]
TensorParallelOption = Annotated[
    int, typer.Option("--tensor-parallel-size", min=1, help="GPUs that the model is split over.")
]
GpuMemoryOption = Annotated[
    float | None,
    typer.Option("--gpu-memory-utilization", help="Share of a GPU's memory for weights, cache and all else; 0.9."),
]
EagerOption = Annotated[bool, typer.Option("--enforce-eager", help="Do not record CUDA graphs.")]
DeviceMapOption = Annotated[str | None, typer.Option(help="auto: layers that do not fit on the GPU run on the CPU.")]


PrefixCacheFileOption = Annotated[
    str,
    typer.Option(
        metavar="on|off|PATH",
        help="Keep the prefix cache in a file, so that a long prompt is read once and not after every start. It is as "
        "private as the prompts are.",
    ),
]
PrefixCacheSizeOption = Annotated[
    str | None, typer.Option(help="What that file never grows beyond, like 500MB; by default 1GiB.")
]


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """Where the prefix cache is kept, see `open_prefix_cache`, and how large it may become."""

    file: bool | Path = False
    size: str = "1GiB"


def prefix_cache(file: str, size: str | None) -> PrefixCache:
    """What the two options say.

    Raises:
        ConfigError: one of them cannot be used, or there is a size of no file.
    """
    chosen = PrefixCache(parse_prefix_cache_file(file), size or PrefixCache().size)
    parse_bytes(chosen.size)
    if size is not None and chosen.file is False:
        raise ConfigError("--prefix-cache-size is the size of a file: give --prefix-cache-file on or a path too")
    return chosen


def local_path(model: str) -> Path:
    """The path of a model, fetched first if it has a name and is not here yet.

    Raises:
        ModelNotFoundError: there is no such file, folder or name.
        StoreError: it could not be fetched.
    """
    return resolve(model, announce=announce)


@contextmanager
def draft_weights(speculate: str, target: Path, *, threads: int | None) -> Iterator[Path | None]:
    """Where to load the draft model from that `--speculate` names, if it names one; it is fetched or made first.

    Raises:
        ConfigError: it cannot be made, or `speculate` cannot be read.
        ModelNotFoundError, StoreError, CheckpointError, OutputError: as fetching and quantising do.
    """
    mode = parse_mode(speculate)
    if not mode.needs_draft:
        yield None
        return
    if mode.draft_type is not None:
        announce(f"quantising {target.name} to {mode.draft_type}, to be its own draft")
    source = target if mode.draft is None else local_path(mode.draft)
    quantised = importlib.import_module("nybble.compress.on_load").quantised  # 20 ms that other runs need not wait for
    with quantised(source, mode.draft_type, threads=threads) as path:
        yield path


def announce(message: str) -> None:
    """Say something on standard error before something slow starts."""
    print(message, file=sys.stderr, flush=True)
