#!/usr/bin/env python3
"""Time to first token behind a system prompt of 2,000 tokens: cold, and after a restart with the prefix cache's file.

    python bench/restart.py [--rounds 5] [--out docs/benchmarks] MODEL.gguf ...

Each round starts two processes one after the other with a file that is new in that round. Loading is not in the time;
reading blocks back from the file is. The answers must be the same.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nybble import LLM, SamplingParams, __version__

PREFIX, SUFFIX = 2000, 16
TARGET = 10.0


def first_token(model: Path, file: Path, seed: int) -> dict[str, Any]:
    """One process: seconds of the request, how many tokens came back from the file, and the answer."""
    llm = LLM(model, prefix_cache_file=file, max_model_len=4096, kv_cache_memory="1GiB", seed=0)
    draw = random.Random(seed)
    prompt = [draw.randrange(1000, 30_000) for _ in range(PREFIX + SUFFIX)]
    begin = time.perf_counter()
    (output,) = llm.generate(
        [{"prompt_token_ids": prompt}], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False
    )
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "restored": llm.engine_stats().prefix_restored,
        "token": list(output.outputs[0].token_ids),
    }


def measure(model: Path, rounds: int) -> dict[str, Any]:
    """The row of one model."""
    found = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--one", f"{folder}/prefix-cache", "--seed", str(number), str(model)]
            runs = [subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout for _ in range(2)]
        cold, warm = (json.loads(run.splitlines()[-1]) for run in runs)
        if cold["token"] != warm["token"] or cold["restored"] or not warm["restored"]:
            raise SystemExit(f"round {number}: the restart did not go on from the file: {cold}, {warm}")
        found.append((cold["seconds"], warm["seconds"]))
    ratios = [cold / warm for cold, warm in found]
    return {
        "model": model.name,
        "cold_s": statistics.median(cold for cold, _ in found),
        "restart_s": statistics.median(warm for _, warm in found),
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "target": TARGET,
    }


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "# After a restart",
        "",
        f"nybble {report['version']}, `bench/restart.py`: {report['rounds']} rounds, time to first token behind "
        f"{PREFIX} tokens, cold and then in a new process that finds them in the prefix cache's file.",
        "",
        "| model | cold | after a restart | cold is (least to most) | wanted |",
        "|---|---|---|---|---|",
    ]
    for row in report["models"]:
        ratio = row["ratio"]
        lines.append(
            f"| {row['model']} | {row['cold_s']:.2f} s | {1e3 * row['restart_s']:.0f} ms | {ratio['median']:.0f} x "
            f"({ratio['min']:.0f} to {ratio['max']:.0f}) | {row['target']:.0f} x |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of the reports; none are written without it")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(first_token(args.models[0], args.one, args.seed)))
        return
    rows = [measure(path, args.rounds) for path in args.models]
    report = {"version": __version__, "rounds": args.rounds, "models": rows}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "restart.md").write_text(as_markdown(report))
        (args.out / "restart.json").write_text(json.dumps(report, indent=1) + "\n")
    print(as_markdown(report), file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
