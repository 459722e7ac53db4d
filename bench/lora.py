#!/usr/bin/env python3
"""Adapters against none: tokens per second of a batch, round by round in one engine.

In every round the same requests run without adapters, all with one adapter, and with eight adapters in turn, each of
the given rank on all linear layers, with random values. Greedy, no stops, no speculation, no prefix cache. A ratio is
the median over the rounds of the ratio within one round; `decode` counts from the step in which the last prompt ended.

    python bench/lora.py [--rounds 5] [--rank 16] [--out docs/benchmarks] MODEL.gguf ...
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from nybble import EngineOptions, SamplingParams, __version__
from nybble.checkpoint import Checkpoint
from nybble.engine.core import EngineCore
from nybble.engine.start import start_engine

NUM_ADAPTERS = 8
BATCHES = (8, 32)
PROMPT_TOKENS = 64
NEW_TOKENS = 48
TARGET = 0.7
CASES = ("none", "one", "eight")
MODULES = {
    "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj", "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj",
}  # fmt: skip


def write_adapter(folder: Path, checkpoint: Checkpoint, rank: int, seed: int) -> Path:
    """A random PEFT adapter for all linear layers, in float32 as PEFT saves them."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        _, _, rest = name.partition(".")
        layer, _, inner = rest.partition(".")
        if inner not in MODULES:
            continue
        rows, cols = tensor.shape
        module = f"base_model.model.model.layers.{layer}.{MODULES[inner]}"
        tensors[f"{module}.lora_A.weight"] = rng.standard_normal((rank, cols), np.float32) / 10
        tensors[f"{module}.lora_B.weight"] = rng.standard_normal((rows, rank), np.float32) / 1000
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return folder


def run(core: EngineCore, count: int, adapters: list[str | None], vocab: int) -> dict[str, float]:
    """Tokens per second of `count` requests, of the whole and after the prompts."""
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    for i in range(count):
        prompt = rng.integers(0, vocab, PROMPT_TOKENS).tolist()
        core.add_request(core.make_request(str(i), prompt, params, adapter=adapters[i % len(adapters)]))
    begin, before = time.perf_counter(), core.stats()
    decode_begin, decode_tokens = begin, before.generation_tokens
    while core.has_unfinished_requests:
        reading = core.stats().prompt_tokens < before.prompt_tokens + count * PROMPT_TOKENS
        core.step()
        if reading:
            decode_begin, decode_tokens = time.perf_counter(), core.stats().generation_tokens
    end, after = time.perf_counter(), core.stats().generation_tokens
    return {
        "all": (after - before.generation_tokens) / (end - begin),
        "decode": (after - decode_tokens) / (end - decode_begin),
    }


def compare(model: Path, rounds: int, rank: int, threads: int | None) -> dict[str, Any]:
    """The table of one model."""
    options = EngineOptions(
        max_model_len=512, kv_cache_memory="1GiB", enable_prefix_caching=False, speculate="off", threads=threads
    )
    loaded, core = start_engine(model, options)
    vocab = loaded.checkpoint.spec.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_adapter(Path(folder) / str(i), loaded.checkpoint, rank, i) for i in range(NUM_ADAPTERS)]
        begin = time.perf_counter()
        ids = [core.load_adapter(path) for path in paths]
        load_ms = (time.perf_counter() - begin) / NUM_ADAPTERS * 1e3
    chosen: dict[str, list[str | None]] = {"none": [None], "one": [ids[0]], "eight": list(ids)}
    cells = {}
    for batch in BATCHES:
        run(core, batch, [None], vocab)  # warm
        found = []
        for number in range(rounds):
            order = CASES if number % 2 == 0 else CASES[::-1]
            found.append({case: run(core, batch, chosen[case], vocab) for case in order})
        for case in CASES:
            cells[f"{case}@b{batch}"] = {
                part: {
                    "tok_s": statistics.median(one[case][part] for one in found),
                    "ratio": statistics.median(one[case][part] / one["none"][part] for one in found),
                    "min": min(one[case][part] / one["none"][part] for one in found),
                    "max": max(one[case][part] / one["none"][part] for one in found),
                }
                for part in ("all", "decode")
            }
        print(f"{model.stem}: {batch} requests done", file=sys.stderr, flush=True)
    return {
        "model": model.name,
        "threads": loaded.model.threads,
        "isa": loaded.model.isa,
        "adapter_bytes": core.adapters.get(ids[0]).weights.memory_bytes,
        "load_ms": load_ms,
        "cells": cells,
    }


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Adapters in a batch",
        "",
        f"nybble {report['version']}, `{report['command']}`: {report['rounds']} rounds in one engine, the three cases "
        f"in each round; {PROMPT_TOKENS} prompt tokens and {NEW_TOKENS} new ones per request, greedy. Adapters of rank "
        f"{report['rank']} on all linear layers. A ratio is the median over the rounds (least to most); the target is "
        f"{TARGET:g} with eight adapters.",
    ]
    for table in report["models"]:
        lines += [
            "",
            f"## {table['model']}",
            "",
            f"{table['threads']} threads, {table['isa']}; an adapter takes {table['adapter_bytes'] / 1e6:.1f} MB and "
            f"is loaded in {table['load_ms']:.0f} ms.",
            "",
            "| requests | adapters | tok/s | ratio | decode, tok/s | ratio |",
            "|---|---|---|---|---|---|",
        ]
        for name, cell in table["cells"].items():
            case, _, batch = name.partition("@b")
            both = " | ".join(
                f"{part['tok_s']:.0f} | {part['ratio']:.2f} ({part['min']:.2f} to {part['max']:.2f})"
                for part in (cell["all"], cell["decode"])
            )
            lines.append(f"| {batch} | {case} | {both} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="folder of the reports; none are written without it")
    args = parser.parse_args()
    report = {
        "version": __version__,
        "command": "bench/lora.py " + " ".join(path.name for path in args.models),
        "rounds": args.rounds,
        "rank": args.rank,
        "models": [compare(path, args.rounds, args.rank, args.threads) for path in args.models],
    }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "lora.md").write_text(as_markdown(report))
        (args.out / "lora.json").write_text(json.dumps(report, indent=1) + "\n")
    print(as_markdown(report), file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
