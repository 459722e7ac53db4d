#!/usr/bin/env python3
"""Decoding one sequence: bytes that a token must read, per second, beside the copy bandwidth of the same run.

Random weights at real shapes. A step is timed from its inputs on the host to the drawn token; with CUDA graphs.

    python bench/gpu/decode.py [--shape llama-2-7b] [--encodings BF16,Q4_K] [--context 512] [--out docs/benchmarks/gpu]

Without a GPU it only shows that it runs: give it --shape tiny.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_model import ENCODINGS, SHAPES, random_checkpoint

from nybble import __version__
from nybble.backends.cpu import SampleRow, Step
from nybble.backends.device import DeviceOptions
from nybble.backends.torch.serve import TorchModel
from nybble.engine.roofline import model_cost

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def copy_gb_s(num_bytes: int = 2**31 if ON_GPU else 2**26) -> float:
    """Bytes read and written per second by a large copy: the best of ten."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        target.copy_(source)
        synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * num_bytes / best / 1e9


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def measure(shape: str, encoding: str, context: int, steps: int, *, eager: bool) -> dict[str, Any]:
    """Seconds per token after `context` tokens, and the bytes that it had to read."""
    checkpoint = random_checkpoint(shape, encoding)
    options = DeviceOptions(device="cuda" if ON_GPU else "torch-cpu", enforce_eager=eager)
    longest = -(-(context + 2 * steps + 16) // 16) * 16
    begin = time.perf_counter()
    model = TorchModel.load(
        checkpoint, device="cuda" if ON_GPU else "torch-cpu", options=options, context=longest, kv_cache_type="f16"
    )
    loading = time.perf_counter() - begin
    model.new_cache(longest // 16)
    table = np.arange(longest // 16, dtype=np.int32)[None]
    rows = [SampleRow(temperature=0.0, logprobs=None)]

    def run(tokens: list[int], at: int) -> int:
        step = Step(
            token_ids=np.array(tokens, np.int32),
            cu_seqlens_q=np.array([0, len(tokens)], np.int32),
            context_lens=np.array([at], np.int32),
            block_tables=table,
            logit_rows=np.array([len(tokens) - 1], np.int32),
        )
        return model.sample(model.execute(step), rows)[0].token_id

    token = run([1 + i % 200 for i in range(context)], 0)
    for i in range(steps):  # kernels are compiled and tuned, and the graph is recorded
        token = run([token], context + i)
    seconds = []
    for i in range(steps):
        begin = time.perf_counter()
        token = run([token], context + steps + i)
        seconds.append(time.perf_counter() - begin)
    cost = model_cost(checkpoint)
    num_bytes = cost.weight_bytes + cost.kv_bytes(context + steps + steps // 2)
    median = statistics.median(seconds)
    return {
        "shape": shape, "encoding": encoding, "graphs": ON_GPU and not eager, "context": context,
        "ms_per_token": median * 1e3, "ms_least": min(seconds) * 1e3, "gb_per_token": num_bytes / 1e9,
        "gb_s": num_bytes / median / 1e9, "loading_s": loading, "weights_gb": model.memory_bytes / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--encodings", default="BF16,Q4_K", help=f"with commas, of {', '.join(ENCODINGS)}")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="measure without CUDA graphs as well")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    bandwidth = copy_gb_s()
    rows = []
    for encoding in given.encodings.split(","):
        for eager in (False, True) if given.eager else (False,):
            row = measure(given.shape, encoding, given.context, given.steps, eager=eager)
            row["of_copy_bandwidth"] = row["gb_s"] / bandwidth
            rows.append(row)
            print(
                f"{row['shape']} {encoding}{' eager' if eager else ''}: {row['ms_per_token']:.2f} ms per token, "
                f"{row['gb_s']:.0f} GB/s, {row['of_copy_bandwidth']:.0%} of a copy's {bandwidth:.0f} GB/s"
            )
            if ON_GPU:
                torch.cuda.empty_cache()
    report = {
        "benchmark": "gpu-decode", "nybble": __version__, "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu", "copy_gb_s": bandwidth, "rows": rows,
    }  # fmt: skip
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "decode.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
