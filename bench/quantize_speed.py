#!/usr/bin/env python3
"""Seconds that `nybble quantize` and llama.cpp's `llama-quantize` take for the same file, whole commands, in turns.

    python bench/quantize_speed.py --bin LLAMA_CPP/build/bin [--to Q4_K_M] [--rounds 5] [--json F] [--md F] F16.gguf

Both read the source from the page cache and write into --work, best a folder in memory: encoding is measured, not a
disk. One round of each goes before, untimed. The two files are compared.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compare_llama_cpp import cpu_name

from nybble import __version__

NYBBLE = "from nybble.cli.app import main; main()"


def timed(command: list[str], target: Path) -> float:
    target.unlink(missing_ok=True)
    begin = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    seconds = time.perf_counter() - begin
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed: {done.stdout[-300:]}{done.stderr[-300:]}")
    return seconds


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    threads = str(args.threads)
    options = ["--to", args.to, "--threads", threads]
    commands = {
        "nybble": ([sys.executable, "-c", NYBBLE, "quantize", str(args.model), str(ours), *options], ours),
        "llama-quantize": ([str(args.bin / "llama-quantize"), str(args.model), str(theirs), args.to, threads], theirs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(args.rounds + 1):
        for name, (command, target) in commands.items():
            took = timed(command, target)
            if number:
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "nybble": __version__,
        "cpu": cpu_name(),
        "kernel": platform.release(),
        "threads": args.threads,
        "model": args.model.name,
        "to": args.to,
        "source_bytes": args.model.stat().st_size,
        "target_bytes": ours.stat().st_size,
        "same_file": filecmp.cmp(ours, theirs, shallow=False),
        "seconds": seconds,
        "median_seconds": medians,
        "ratio": medians["llama-quantize"] / medians["nybble"],
    }


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "# How long quantising takes, beside llama-quantize",
        "",
        f"Taken by `bench/quantize_speed.py`: whole commands with {found['threads']} threads, in turns, files in "
        f"memory, after one untimed round. {found['cpu']}; nybble {found['nybble']}, llama.cpp build 11434.",
        "",
        f"| {found['model']} to {found['to']} | median s | least | greatest |",
        "|---|---|---|---|",
    ]
    for name, values in found["seconds"].items():
        lines.append(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    same = "are the same" if found["same_file"] else "differ"
    lines += ["", f"`llama-quantize` takes {found['ratio']:.2f} times as long; the two files {same}, byte by byte.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--to", default="Q4_K_M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--md", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        found = measure(args, Path(folder))
    text = markdown(found)
    print(text)
    if args.md is not None:
        args.md.write_text(text)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
