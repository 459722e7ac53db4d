"""What `nybble distil` and `nybble qat` share: options of the training loop, and how a run is started and told of."""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from nybble.cli.progress import Bar
from nybble.compress.methods import Silent
from nybble.compress.stage import StageResult, parse_options, partial
from nybble.core.errors import ConfigError, OutputError

Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="TEXT|DATASET|self|self:TEXT",
        help="A text or JSONL file, a `datasets` name, self: what the teacher writes, or self:TEXT: what it writes "
        "after passages of TEXT. May be given several times. Default: Python's docs.",
    ),
]
Tokens = Annotated[int | None, typer.Option(help="Tokens of it to use. Default: as many as the run reads.")]
Steps = Annotated[int | None, typer.Option(help="Updates of the weights. Default: 200.")]
Minutes = Annotated[float | None, typer.Option(help="Or: as many updates as fit so many minutes.")]
Batch = Annotated[int | None, typer.Option(help="Sequences of one pass. Default: 2.")]
SeqLen = Annotated[int | None, typer.Option(help="Tokens of a sequence. Default: 256.")]
Accumulate = Annotated[int | None, typer.Option(help="Passes of one update. Default: 1.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak of the learning rate.")]
Warmup = Annotated[int | None, typer.Option(help="Updates until the peak. Default: 10.")]
WeightDecay = Annotated[float | None, typer.Option(help="Pull of weights to zero. Default: 0.")]
Seed = Annotated[
    int | None, typer.Option(help="Of the order of the data, and of the text with --data self. Default: 0.")
]
Bf16 = Annotated[
    bool | None,
    typer.Option("--bf16/--no-bf16", help="Products in bfloat16. Default: where the processor is fast at it."),
]
Recompute = Annotated[
    bool, typer.Option("--recompute", help="Keep no activations inside of layers: less memory, a third more time.")
]
Alpha = Annotated[
    float | None, typer.Option(help="Share of the teacher in the loss; the rest is the text's. Default: 1.")
]
Temperature = Annotated[float | None, typer.Option(help="That softens both distributions. Default: 1.")]
TopK = Annotated[
    int | None, typer.Option(metavar="K", help="Run the teacher once, and keep its K likeliest tokens on the disk.")
]
Cache = Annotated[Path | None, typer.Option(metavar="FOLDER", help="With --top-k: keep them here for other runs too.")]
SaveMinutes = Annotated[float | None, typer.Option(help="Minutes between two checkpoints. Default: 5.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
Force = Annotated[bool, typer.Option("--force", help="Replace DST if it exists, and unfinished work for it.")]


def one_or_more(data: list[str] | None) -> str | tuple[str, ...] | None:
    """What was given with --data, as the options of a run take it."""
    if not data:
        return None
    return data[0] if len(data) == 1 else tuple(data)


def train(
    command: str,
    module: str,
    names: tuple[str, str],
    source: Path,
    target: Path,
    given: Mapping[str, object],
    *,
    resume: bool,
    force: bool,
) -> None:
    """Run a training command. names: of the options and of the function in `module`.

    Raises NybbleErrors: torch is missing, an option cannot be used, unfinished work would be lost, and what the run
    itself raises.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"{command} needs PyTorch: pip install 'nybble[compress]'")
    found: Any = importlib.import_module(module)
    said = {name: value for name, value in given.items() if value is not None and value != ()}
    options = parse_options(getattr(found, names[0]), said, where=command)
    if not resume and not force:
        _refuse_to_lose(target)
    run: Callable[..., StageResult] = getattr(found, names[1])
    began = time.perf_counter()
    leads = os.environ.get("RANK", "0") == "0"
    with Bar() if leads else nullcontext(Silent()) as progress:
        result = run(source, target, options, progress=progress, resume=resume, force=force)
    if leads:
        _show(target, result, time.perf_counter() - began)


def _refuse_to_lose(target: Path) -> None:
    folder = partial(target)
    steps = sorted(folder.glob("step-*.json")) if folder.is_dir() else []
    if steps:
        step = int(steps[-1].stem.removeprefix("step-"))
        raise OutputError(
            f"{folder} holds an unfinished run at step {step}: go on with --resume, or start again with --force"
        )


def _show(target: Path, result: StageResult, seconds: float) -> None:
    figures = result.figures
    print(
        f"{target}: {figures.get('steps')} steps, {figures.get('tokens')} tokens; loss {figures.get('first_loss')} at "
        f"the beginning, {figures.get('last_loss')} at the end; {seconds:.0f} s, log {result.log}"
    )
