#!/usr/bin/env python3
"""How fast one stream is decoded from every type, and how near that comes to what memory delivers.

    python bench/encoding_speed.py make --reference DIR --work DIR [--only REGEX]
    python bench/encoding_speed.py measure --work DIR --json FILE [--llama-bin DIR] [--only REGEX] [--rounds 5]
    python bench/encoding_speed.py table --json FILE --markdown FILE

`make` quantises the reference to each type. `measure` goes round by round through all of them, llama.cpp (`--repack 0`
and `1`, the better one counts) before nybble: 32 tokens after a prompt of 128, greedy, one stream. A cell is the median
of the rounds. The roofline is measured once in each round. A run may be cut into pieces by `--only`; types that the
document has already are left out. GPTQ and AWQ folders are repacked from `int` folders, which changes their layout and
not how much there is to compute.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_cpp import run as run_peer
from quality_rows import GGUF, NYBBLE, run

from nybble import __version__
from nybble.engine.load import load_model
from nybble.engine.roofline import DEFINITION, Roofline, measure_roofline
from nybble.evaluate.speed import METRICS_VERSION, SpeedTest, measure

TEST = SpeedTest("tg", 32, 1)
PROMPT = 128
NO_SEARCH = ("--no-clip-search",)  # where a range is clipped changes no kernel
# Name -> the type that it is made with, and its options.
FOLDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "fp16": ("fp16", ()), "bf16": ("bf16", ()), "fp8": ("fp8", ()), "llm-int8": ("llm-int8", ()), "nf4": ("nf4", ()),
    "nf4 --double-quant": ("nf4", ("--double-quant",)), "fp4": ("fp4", ()), "int8": ("int8", ()),
    "int4": ("int4", NO_SEARCH), "int4 --asymmetric": ("int4", ("--asymmetric", *NO_SEARCH)),
    "int4 --group-size 32": ("int4", ("--group-size", "32", *NO_SEARCH)), "int3": ("int3", NO_SEARCH),
    "int2": ("int2", NO_SEARCH),
}  # fmt: skip
# Name -> the folder that it is repacked from.
REPACKED = {
    "gptq-8bit": "int8",
    "gptq-4bit": "int4",
    "gptq-3bit": "int3",
    "gptq-2bit": "int2",
    "awq-4bit": "int4 --asymmetric",
}
ALL_GGUF = ("F16", "BF16", *GGUF, "MXFP4")
NAMES = (*ALL_GGUF, *FOLDERS, *REPACKED)
NOT_LLAMA = ("MXFP4",)  # llama-bench has no dense model of this type to run

Document = dict[str, Any]


def file_of(work: Path, name: str) -> Path:
    return work / (name.replace(" ", "_") + (".gguf" if name in ALL_GGUF else ""))


def make(args: argparse.Namespace) -> None:
    """What is there already stays."""
    args.work.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        path = file_of(args.work, name)
        if path.exists() or not re.search(args.only, name):
            continue
        print(name, file=sys.stderr, flush=True)
        if name in REPACKED:
            to = name.partition("-")[0]
            run([NYBBLE, "convert", file_of(args.work, REPACKED[name]), path, "--to", to])
        else:
            kind, options = FOLDERS.get(name, (name, ()))
            run([NYBBLE, "quantize", args.reference, path, "--to", kind, "--threads", args.threads, *options])


def one_round(path: Path, roofline: Roofline, threads: int) -> tuple[float, float]:
    """Tokens per second and the fraction of the roofline, of a model that is loaded for it."""
    loaded = load_model(path, threads=threads, context=TEST.context)
    [result] = measure(loaded, [TEST], roofline=roofline, repeat=1)
    del loaded
    gc.collect()
    return result.tok_s.median, result.roofline_fraction


def peer_round(bin_dir: Path, path: Path, threads: int, repack: int) -> float:
    """Tokens per second by llama-bench, whose warm-up is its own."""
    command = [str(bin_dir / "llama-bench"), "-m", str(path), "-p", "0", "-n", str(TEST.num_tokens), "-d", str(PROMPT)]
    command += ["-r", "1", "-t", str(threads), "--repack", str(repack), "-o", "json"]
    return float(json.loads(run_peer(command))[0]["avg_ts"])


def take(args: argparse.Namespace) -> None:
    """Rounds go through all types, so that a slow minute hits all of them alike."""
    document: Document = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {"rows": {}}
    names = [name for name in NAMES if re.search(args.only, name) and name not in document["rows"]]
    names = [name for name in names if file_of(args.work, name).exists()]
    raw: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    rooflines: list[Roofline] = []
    for number in range(1, args.rounds + 1):
        print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
        roofline = measure_roofline(args.threads)
        rooflines.append(roofline)
        for name in names:
            path = file_of(args.work, name)
            if args.llama_bin is not None and name in ALL_GGUF and name not in NOT_LLAMA:
                for repack in (0, 1):
                    speed = peer_round(args.llama_bin, path, args.threads, repack)
                    raw[name].setdefault(f"repack{repack}", []).append(speed)
            speed, fraction = one_round(path, roofline, args.threads)
            raw[name].setdefault("nybble", []).append(speed)
            raw[name].setdefault("fraction", []).append(fraction)
    document |= {
        "model": args.model, "test": TEST.name, "prompt_tokens": PROMPT, "threads": args.threads, "cpu": cpu_name(),
        "version": __version__, "metrics_version": METRICS_VERSION, "definition": DEFINITION,
    }  # fmt: skip
    for name in names:
        path = file_of(args.work, name)
        document["rows"][name] = {"bytes": size_of(path), "rooflines": [asdict(one) for one in rooflines], **raw[name]}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(rounded(row))}" for name, row in document["rows"].items())
    rest = json.dumps({key: value for key, value in document.items() if key != "rows"}, indent=1)
    args.json.write_text(f'{rest.removesuffix("}").rstrip()},\n "rows": {{\n{rows}\n}}}}\n', "utf-8")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def size_of(path: Path) -> int:
    """Of the weights' files."""
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def table(document: Document) -> str:
    rates = [roofline["read_gb_s"] for row in document["rows"].values() for roofline in row["rooflines"]]
    rounds = max(len(row["nybble"]) for row in document["rows"].values())
    lines = [
        "# How fast one stream is decoded from every type",
        "",
        f"{document['model']}, {document['cpu']}, {document['threads']} threads, nybble {document['version']}; "
        f"{TEST.num_tokens} tokens after a prompt of {PROMPT}, greedy, one stream. Medians of {rounds} interleaved "
        "rounds, in brackets the least and the greatest. llama.cpp (build 11434) is `llama-bench` with the better of "
        f"`--repack 0` and `1`. The memory delivered {min(rates):.0f} to {max(rates):.0f} GB/s, measured each round. "
        "Taken by `bench/encoding_speed.py`; README.md has the definitions.",
        "",
        "| type | MB | tokens/s | of the roofline | llama.cpp | x |",
        "|---|---|---|---|---|---|",
        *(_row(name, document["rows"][name]) for name in NAMES if name in document["rows"]),
        "",
    ]
    return "\n".join(lines)


def _row(name: str, row: Document) -> str:
    speed = statistics.median(row["nybble"])
    spread = f"{speed:.1f} [{min(row['nybble']):.1f}, {max(row['nybble']):.1f}]"
    peer = max((statistics.median(row[key]) for key in ("repack0", "repack1") if key in row), default=None)
    beside = "|  |" if peer is None else f"| {peer:.1f} | {speed / peer:.2f} |"
    return f"| {name} | {row['bytes'] / 1e6:.0f} | {spread} | {statistics.median(row['fraction']):.0%} {beside}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "measure", "table"))
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--llama-bin", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--model", default="Qwen2.5-Coder-0.5B-Instruct", help="what the page calls the model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.action == "make":
        make(args)
    elif args.action == "measure":
        take(args)
    else:
        args.markdown.write_text(table(json.loads(args.json.read_text("utf-8"))), "utf-8")


if __name__ == "__main__":
    main()
