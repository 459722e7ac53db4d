"""`nybble distil`: a smaller model learns from a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import training
from nybble.cli.options import ThreadsOption, local_path


def distil(
    student: Annotated[
        str, typer.Argument(metavar="STUDENT", help="The model that learns: a folder, a GGUF file, a name.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="What to write: a folder, or NAME.gguf.")],
    teacher: Annotated[str, typer.Option("--teacher", metavar="MODEL", help="A model with the same tokenizer.")],
    data: training.Data = None,
    tokens: training.Tokens = None,
    steps: training.Steps = None,
    minutes: training.Minutes = None,
    learning_rate: training.LearningRate = None,
    alpha: training.Alpha = None,
    temperature: training.Temperature = None,
    hidden: Annotated[
        float | None,
        typer.Option(help="Weight of the hidden-state terms, for students without some layers. Default: 0."),
    ] = None,
    fit: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Fit each layer to the teacher's on so many tokens before training; 0: do not. "
            "Default: 32768, if STUDENT is the teacher with parts taken out.",
        ),
    ] = None,
    top_k: training.TopK = None,
    cache: training.Cache = None,
    batch: training.Batch = None,
    seq_len: training.SeqLen = None,
    accumulate: training.Accumulate = None,
    warmup: training.Warmup = None,
    weight_decay: training.WeightDecay = None,
    seed: training.Seed = None,
    bf16: training.Bf16 = None,
    recompute: training.Recompute = False,
    save_minutes: training.SaveMinutes = None,
    threads: ThreadsOption = None,
    resume: training.Resume = False,
    force: training.Force = False,
) -> None:
    """Train STUDENT to say what the teacher says, and write it to DST. See docs/train.md."""
    given: dict[str, object] = {
        "teacher": local_path(teacher),
        "data": training.one_or_more(data),
        "tokens": tokens,
        "steps": steps,
        "minutes": minutes,
        "learning_rate": learning_rate,
        "alpha": alpha,
        "temperature": temperature,
        "hidden": hidden,
        "fit": fit,
        "top_k": top_k,
        "cache": cache,
        "batch": batch,
        "seq_len": seq_len,
        "accumulate": accumulate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "seed": seed,
        "bf16": bf16,
        "recompute": recompute,
        "save_minutes": save_minutes,
        "threads": threads,
    }
    training.train(
        "nybble distil",
        "nybble.compress.distil",
        ("DistilOptions", "run_distil"),
        local_path(student),
        target,
        given,
        resume=resume,
        force=force,
    )
