"""`nybble qat`: weights that learn to lie on the grid of a file with few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import training
from nybble.cli.options import ThreadsOption, local_path


def qat(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A float model: a folder, a GGUF file, a name.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="What to write: a folder, or NAME.gguf for GGUF types.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="TYPE", help="int8, int4, int2 (a folder); Q4_K, Q2_K, ... (a GGUF file); nf4 with --lora."
        ),
    ],
    teacher: Annotated[
        str | None, typer.Option("--teacher", metavar="MODEL", help="Whose words are learned. Default: SRC itself.")
    ] = None,
    data: training.Data = None,
    tokens: training.Tokens = None,
    steps: training.Steps = None,
    minutes: training.Minutes = None,
    learning_rate: training.LearningRate = None,
    scale_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the scales, in units of that of the weights. Default: 20.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(min=-1, help="Inputs per scale of integers; -1: a row.")] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="Integers with zero points.")] = False,
    tensor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX=TYPE", help="GGUF: another type for tensors whose name it is found in; repeatable."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Which inputs matter, for where scales start. Default: measured on the data.")
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(metavar="merge|adapter", help="With --to nf4: train low-rank factors; merge them, or write them."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the factors. Default: 8.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Of the factors. Default: 16.")] = None,
    alpha: training.Alpha = None,
    temperature: training.Temperature = None,
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
    """Train SRC with quantisation in the loop, and write it to DST in that type. See docs/train.md."""
    given: dict[str, object] = {
        "to": to,
        "teacher": None if teacher is None else local_path(teacher),
        "data": training.one_or_more(data),
        "tokens": tokens,
        "steps": steps,
        "minutes": minutes,
        "learning_rate": learning_rate,
        "scale_rate": scale_rate,
        "group_size": group_size,
        "tensor": tuple(tensor or ()),
        "imatrix": imatrix,
        "lora": lora,
        "rank": rank,
        "lora_alpha": lora_alpha,
        "alpha": alpha,
        "temperature": temperature,
        "top_k": top_k,
        "cache": cache,
        "batch": batch,
        "seq_len": seq_len,
        "accumulate": accumulate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "seed": seed,
        "recompute": recompute,
        "save_minutes": save_minutes,
        "threads": threads,
    }
    if bf16 is not None:
        given["bf16"] = bf16
    if asymmetric:
        given["symmetric"] = False
    training.train(
        "nybble qat",
        "nybble.compress.qat",
        ("QatOptions", "run_qat"),
        local_path(source),
        target,
        given,
        resume=resume,
        force=force,
    )
