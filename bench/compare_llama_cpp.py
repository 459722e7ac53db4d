#!/usr/bin/env python3
"""Speed of nybble beside llama.cpp's, in one run, round by round.

In each round every engine runs once on every model: llama.cpp without and with its repacked weights (`--repack 0` and
`1`), then nybble. A cell is the median over the rounds, and llama.cpp's is the better of its two ways. Same file, same
number of threads. Prefill is one prompt of 512 tokens; decode is 64 tokens per stream on 1, 8 and 32 streams at once,
each after a prompt of 128 tokens.

    python bench/compare_llama_cpp.py --llama-bin DIR [--llama-version 11434] [--out docs/benchmarks] MODEL.gguf ...

A long run can be cut into pieces: `--rounds 1 --out` for each, then `--merge` their documents.

Writes <date>-<cpu>.json and .md there; the last line of standard output is the same JSON document.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llama_cpp import decode_speeds, prefill_speed

from nybble import __version__
from nybble.backends.cpu import default_threads

PREFILL = 512
DECODE_PROMPT, DECODE = 128, 64
CELLS = ("pp512@b1", "tg64@b1", "tg64@b8", "tg64@b32")
HEADINGS = ("prefill 512", "decode, 1", "decode, 8", "decode, 32")
# How many times as fast as llama.cpp each cell has to be.
TARGETS: dict[str, tuple[float, ...]] = {
    "smollm2-135m": (4, 1.3, 3, 4),
    "qwen0.5b": (3, 1.3, 3, 4),
    "qwen1.5b": (2.5, 1.1, 2.5, 3),
}
START_RUNS = 3

Cells = dict[str, float]


def measure_llama_cpp(bin_dir: Path, model: Path, threads: int, repack: int, streams: list[int]) -> Cells:
    prefill = prefill_speed(bin_dir, model, tokens=PREFILL, threads=threads, repack=repack)
    decode = decode_speeds(
        bin_dir, model, prompt=DECODE_PROMPT, tokens=DECODE, streams=streams, threads=threads, repack=repack
    )
    return {f"pp{PREFILL}@b1": prefill} | {f"tg{DECODE}@b{count}": speed for count, speed in decode.items()}


def measure_nybble(model: Path, threads: int, streams: list[int]) -> tuple[Cells, Cells, dict[str, float]]:
    """Speeds, fractions of the roofline, and the roofline itself; in new processes, like the peer."""
    speeds: Cells = {}
    fractions: Cells = {}
    roofline: dict[str, float] = {}
    batches = ",".join(map(str, streams))
    for options in (["-p", str(PREFILL), "-n", "0", "-b", "1"], ["-p", "0", "-n", str(DECODE), "-b", batches]):
        command = [*nybble(), "bench", str(model), *options, "--threads", str(threads), "--repeat", "1", "--json"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        report = json.loads(done.stdout.splitlines()[-1])
        roofline = report["roofline"]
        for result in report["results"]:
            speeds[result["test"]] = result["tok_s"]["median"]
            fractions[result["test"]] = result["roofline_fraction"]
    return speeds, fractions, roofline


def nybble() -> list[str]:
    """The command line of the nybble that this Python would import."""
    return [sys.executable, "-c", "from nybble.cli.app import main; main()"]


def measure_start(model: Path, threads: int) -> dict[str, float]:
    """Seconds from process start to the first token on a pipe, and the peak memory; the file is in the page cache.

    The prompt is short, so that this is the time to load the model, and the context small, so that the cache is.
    """
    seconds, peaks = [], []
    for _ in range(START_RUNS):
        command = [*nybble(), "run", str(model), "Hello", "--raw", "--max-tokens", "1", "--temperature", "0"]
        begin = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--ctx", "256", "--threads", str(threads)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.read(1)
        seconds.append(time.perf_counter() - begin)
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed")
        peaks.append(peak_bytes(usage))
    return {"first_token_s": statistics.median(seconds), "peak_bytes": max(peaks)}


def peak_bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    raw: dict[str, dict[str, list[Cells]]] = {
        model.stem: {name: [] for name in ("repack0", "repack1", "nybble", "fractions", "roofline")}
        for model in args.models
    }
    for round_number in range(1, args.rounds + 1):
        for model in args.models:
            print(f"round {round_number} of {args.rounds}: {model.name}", file=sys.stderr, flush=True)
            into = raw[model.stem]
            for repack in (0, 1):
                cells = measure_llama_cpp(args.llama_bin, model, args.threads, repack, args.streams)
                into[f"repack{repack}"].append(cells)
            speeds, fractions, roofline = measure_nybble(model, args.threads, args.streams)
            into["nybble"].append(speeds)
            into["fractions"].append(fractions)
            into["roofline"].append(roofline)
            print(json.dumps({key: rows[-1] for key, rows in into.items()}), file=sys.stderr, flush=True)
    return {model.stem: summarise(model, raw[model.stem], measure_start(model, args.threads)) for model in args.models}


def merged(args: argparse.Namespace) -> dict[str, Any]:
    """The rounds of earlier runs, in the order of their documents, as if they were one run."""
    documents = [json.loads(path.read_text()) for path in args.merge]
    found = {}
    for model in args.models:
        parts = [document["models"][model.stem] for document in documents if model.stem in document["models"]]
        if not parts:
            raise SystemExit(f"none of the documents has {model.stem}")
        raw = {key: [row for part in parts for row in part["rounds"][key]] for key in parts[0]["rounds"]}
        start = {
            "first_token_s": statistics.median(part["start"]["first_token_s"] for part in parts),
            "peak_bytes": max(part["start"]["peak_bytes"] for part in parts),
        }
        found[model.stem] = summarise(model, raw, start)
    return found


def summarise(model: Path, raw: dict[str, list[Cells]], start: dict[str, float]) -> dict[str, Any]:
    targets = dict(zip(CELLS, TARGETS.get(model.stem, ()), strict=False))
    cells = {}
    for cell in raw["nybble"][0]:
        peers = {way: statistics.median(row[cell] for row in raw[way]) for way in ("repack0", "repack1")}
        own = [row[cell] for row in raw["nybble"]]
        ratio = statistics.median(own) / max(peers.values())
        cells[cell] = {
            "nybble": {"median": statistics.median(own), "min": min(own), "max": max(own)},
            "llama_cpp": peers,
            "ratio": ratio,
            "target": targets.get(cell),
            "met": None if cell not in targets else ratio >= targets[cell],
            "roofline_fraction": statistics.median(row[cell] for row in raw["fractions"]),
        }
    roofline = {key: statistics.median(row[key] for row in raw["roofline"]) for key in raw["roofline"][0]}
    file_bytes = model.stat().st_size
    start["peak_allowed_bytes"] = file_bytes * 1.1 + 150e6  # and the cache, which is small at this context
    return {"file_bytes": file_bytes, "cells": cells, "roofline": roofline, "start": start, "rounds": raw}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text("utf-8")) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def markdown(document: dict[str, Any]) -> str:
    """The table of the document, with every ratio beside its target."""
    lines = [
        f"# nybble {document['nybble']} and llama.cpp {document['llama_cpp']}, {document['date']}",
        "",
        f"{document['cpu']}, {document['threads']} threads, medians of {document['rounds']} interleaved rounds, tokens "
        "per second over all streams; llama.cpp: the better of `--repack 0` and `1` per cell. Prefill is one prompt of "
        f"{PREFILL} tokens, decode {DECODE} tokens per stream after {DECODE_PROMPT}. Taken by "
        "`bench/compare_llama_cpp.py`.",
        "",
        "| model | cell | nybble | llama.cpp | ratio | target | of the roofline |",
        "|---|---|---|---|---|---|---|",
    ]
    titles = dict(zip(CELLS, HEADINGS, strict=True))
    for name, model in document["models"].items():
        for cell, row in model["cells"].items():
            best = max(row["llama_cpp"], key=row["llama_cpp"].get)
            target = "" if row["target"] is None else f"{row['target']} x {'met' if row['met'] else '**missed**'}"
            lines.append(
                f"| {name} | {titles.get(cell, cell)} | {row['nybble']['median']:.1f} | "
                f"{row['llama_cpp'][best]:.1f} ({best}) | {row['ratio']:.2f} x | {target} | "
                f"{row['roofline_fraction']:.0%} |"
            )
    lines += [
        "",
        "| model | read GB/s | int8 Gop/s | first token s | peak MB | allowed MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, model in document["models"].items():
        roofline, start = model["roofline"], model["start"]
        lines.append(
            f"| {name} | {roofline['read_gb_s']:.1f} | {roofline['int8_gops']:.0f} | {start['first_token_s']:.2f} | "
            f"{start['peak_bytes'] / 1e6:.0f} | {start['peak_allowed_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--llama-bin", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--llama-version", default="(build not stated)", help="for the report")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--out", type=Path, help="folder of the reports; none are written without it")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="JSON", help="measure nothing, join these documents")
    args = parser.parse_args()
    models = merged(args) if args.merge else measure(args)
    document: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": args.threads,
        "rounds": min(len(model["rounds"]["nybble"]) for model in models.values()),
        "nybble": __version__,
        "llama_cpp": args.llama_version,
        "models": models,
    }
    if args.out:
        slug = re.sub(r"[^a-z0-9]+", "-", document["cpu"].lower()).strip("-")
        stem = args.out / f"{document['date']}-{slug}"
        args.out.mkdir(parents=True, exist_ok=True)
        Path(f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        Path(f"{stem}.md").write_text(markdown(document), "utf-8")
    print(markdown(document), file=sys.stderr)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
