#!/usr/bin/env python3
"""FlashAttention beside torch's own attention and the naive formula: time, arithmetic per second, and peak memory.

Every round runs each of them once, in turn, on the same tensors; a cell is the median over the rounds.

    python bench/gpu/flash_attention.py [--tokens 16384] [--rounds 7] [--out docs/benchmarks/gpu]

On a machine without a GPU (with TRITON_INTERPRET=1) it only shows that it runs: give it --tokens 64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nybble import __version__
from nybble.backends.torch.flash import flash_attention

HEADS, WIDTH = 16, 128
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
NAIVE_LIMIT = 2**31  # scores of more bytes than this are not tried


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = q @ k.transpose(-1, -2) * WIDTH**-0.5
    hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return torch.softmax(s.masked_fill(hidden, float("-inf")), dim=-1) @ v


def torchs(backend: SDPBackend) -> Attention:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return flash_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def candidates(on_gpu: bool, tokens: int) -> dict[str, Attention]:
    found: dict[str, Attention] = {"nybble": ours}
    if on_gpu:
        found |= {"torch flash": torchs(SDPBackend.FLASH_ATTENTION), "torch cudnn": torchs(SDPBackend.CUDNN_ATTENTION)}
    else:
        found |= {"torch math": torchs(SDPBackend.MATH)}
    if HEADS * tokens * tokens * 2 <= NAIVE_LIMIT:
        found["naive"] = naive
    return found


def timed(work: Callable[[], object], on_gpu: bool) -> tuple[float, int]:
    """Seconds, and bytes of memory that came on top."""
    if not on_gpu:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin, 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    inputs = [torch.randn(1, HEADS, tokens, WIDTH, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    d_out = torch.randn(1, HEADS, tokens, WIDTH, device=device, dtype=dtype)
    # Half of the products of a causal mask: 2 matrix products forward, 5 backward.
    forward_ops = 2 * 2 * HEADS * tokens * tokens * WIDTH / 2
    functions = candidates(on_gpu, tokens)
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    for number in range(rounds + 1):  # the first round compiles
        for name, function in functions.items():
            out: list[torch.Tensor] = []
            took, extra = timed(lambda f=function, o=out: o.append(f(*inputs)), on_gpu)  # type: ignore[misc]
            back, back_extra = timed(lambda o=out: torch.autograd.grad(o[0], inputs, d_out), on_gpu)  # type: ignore[misc]
            if number:
                seconds.setdefault(f"{name} forward", []).append(took)
                seconds.setdefault(f"{name} backward", []).append(back)
                memory[f"{name} forward"], memory[f"{name} backward"] = extra, back_extra
    cells = {
        name: {
            "ms": statistics.median(values) * 1e3,
            "tflops": forward_ops * (2.5 if name.endswith("backward") else 1) / statistics.median(values) / 1e12,
            "extra_mb": memory[name] / 1e6,
        }
        for name, values in seconds.items()
    }
    device_name = torch.cuda.get_device_name() if on_gpu else "cpu (interpreter)"
    return {"version": __version__, "device": device_name, "tokens": tokens, "rounds": rounds, "cells": cells}


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# FlashAttention, {report['device']}",
        "",
        f"nybble {report['version']}, {HEADS} heads of {WIDTH}, {report['tokens']} tokens, causal, medians of "
        f"{report['rounds']} interleaved rounds, taken by `bench/gpu/flash_attention.py`.",
        "",
        "| | ms | Tflop/s | memory on top, MB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {cell['ms']:.3f} | {cell['tflops']:.1f} | {cell['extra_mb']:.0f} |"
        for name, cell in report["cells"].items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder of the reports; none are written without it")
    args = parser.parse_args()
    report = measure(args.tokens, args.rounds)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "flash-attention.md").write_text(as_markdown(report))
        (args.out / "flash-attention.json").write_text(json.dumps(report, indent=1) + "\n")
    print(as_markdown(report))


if __name__ == "__main__":
    main()
