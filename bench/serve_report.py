#!/usr/bin/env python3
"""From the runs of serve_load.py to tables: medians over the rounds, ratios, and how they compare with what was wanted.

    python bench/serve_report.py runs.jsonl --out docs/benchmarks/serving [--versions "llama.cpp 11434" ...]

Writes serving.json, all runs as they are with the summary, and prints the tables in Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from compare_llama_cpp import cpu_name

from nybble import __version__

Runs = dict[str, list[dict[str, Any]]]

# How many times as fast as each peer the server should be.
TARGETS = {"llama": 3.0, "transformers": 14.0, "vllm": 3.5, "openvino": 1.3}
TITLES = {
    "offline": "nybble, `LLM.generate`",
    "http": "nybble, HTTP streaming",
    "plain": "nybble, HTTP streaming, `--speculate off`",
    "llama": "llama-server -np 32, HTTP streaming",
    "openvino": "OpenVINO GenAI int4, continuous batching",
    "vllm": "vLLM for CPUs, bf16",
    "transformers": "Transformers `generate`, one at a time",
}
_NO_FIGURES = ("seed", "jobs", "threads")
MAX_OVERHEAD, MAX_OUTSIDE, MAX_WASTE, MIN_PREFIX = 0.05, 0.03, 0.04, 15.0


def middle(runs: list[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


def summarise(runs: Runs) -> dict[str, Any]:
    """Medians over the rounds; ratios are between the medians of output tokens per second."""
    found: dict[str, Any] = {"mixed": {}, "ratios": {}}
    for piece in TITLES:
        if piece in runs:
            rows = runs[piece]
            keys = [key for key in rows[0] if isinstance(rows[0][key], float | int) and key not in _NO_FIGURES]
            found["mixed"][piece] = {"rounds": len(rows), **{key: middle(rows, key) for key in keys}}
            found["mixed"][piece]["output_tok_s_range"] = [
                min(row["output_tok_s"] for row in rows),
                max(row["output_tok_s"] for row in rows),
            ]
    for peer, wanted in TARGETS.items():
        if peer in found["mixed"] and "http" in found["mixed"]:
            ratio = found["mixed"]["http"]["output_tok_s"] / found["mixed"][peer]["output_tok_s"]
            found["ratios"][peer] = {"ratio": ratio, "target": wanted, "met": ratio >= wanted}
    if "streams" in runs:
        rounds = [one for run in runs["streams"] for one in run["rounds"]]
        found["streams"] = {key: middle(rounds, key) for key in rounds[0]} | {"rounds": len(rounds)}
    if "prefix" in runs:
        found["prefix"] = {}
        for engine in ("nybble", "llama"):
            misses = [t for run in runs["prefix"] if engine in run for t in run[engine]["misses"]]
            hits = [t for run in runs["prefix"] if engine in run for t in run[engine]["hits"]]
            if misses:
                miss, hit = statistics.median(misses), statistics.median(hits)
                found["prefix"][engine] = {"miss_s": miss, "hit_s": hit, "ratio": miss / hit, "misses": len(misses)}
    for piece in ("arrival", "native"):
        if piece in runs:
            keys = [key for key in runs[piece][0] if isinstance(runs[piece][0][key], float)]
            found[piece] = {key: middle(runs[piece], key) for key in keys} | {"rounds": len(runs[piece])}
    return found


def verdict(ok: bool) -> str:
    return "met" if ok else "**missed**"


def tables(found: dict[str, Any]) -> str:
    lines = [
        "| mixed workload | output tok/s | least to greatest | all tok/s | rounds | nybble HTTP is | wanted |",
        "|---|---|---|---|---|---|---|",
    ]
    for piece, row in found["mixed"].items():
        least, greatest = row["output_tok_s_range"]
        ratio = found["ratios"].get(piece)
        said = f"{ratio['ratio']:.2f} x | {ratio['target']:g} x, {verdict(ratio['met'])}" if ratio else " | "
        lines.append(
            f"| {TITLES[piece]} | {row['output_tok_s']:.1f} | {least:.1f} to {greatest:.1f} | "
            f"{row['total_tok_s']:.1f} | {row['rounds']} | {said} |"
        )
    lines += [
        "",
        "| mixed workload, s | TTFT p50 | TTFT p99 | ITL p50 | ITL p99 | ITL max | peak MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for piece in ("http", "plain", "llama"):
        if piece in found["mixed"]:
            row = found["mixed"][piece]
            cells = [f"{row[key]:.2f}" for key in ("ttft_p50_s", "ttft_p99_s")]
            cells += [f"{row[key]:.3f}" for key in ("itl_p50_s", "itl_p99_s", "itl_max_s")]
            lines.append(f"| {TITLES[piece]} | {' | '.join(cells)} | {row.get('peak_bytes', 0) / 1e6:.0f} |")
    lines += ["", "| what | measured | wanted |", "|---|---|---|"]
    lines += [f"| {what} | {value} | {wanted} |" for what, value, wanted in _others(found)]
    return "\n".join(lines) + "\n"


def _others(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    http = found["mixed"].get("http")
    if http:
        waste = http["kv_waste_mean"]
        rows.append(
            ("cache memory that holds no token, mean", f"{waste:.1%}", f"< 4 %, {verdict(waste < MAX_WASTE)}"),
        )
    if "streams" in found:
        over = found["streams"]["overhead"]
        rows.append(
            (
                f"32 streams over HTTP against offline ({found['streams']['rounds']} rounds)",
                f"{over:+.1%} time ({found['streams']['http']:.0f} against {found['streams']['offline']:.0f} tok/s)",
                f"<= 5 %, {verdict(over <= MAX_OVERHEAD)}",
            )
        )
    for engine, row in found.get("prefix", {}).items():
        wanted = f"1/15, {verdict(row['ratio'] >= MIN_PREFIX)}" if engine == "nybble" else ""
        rows.append(
            (
                f"TTFT behind a shared prefix of 2,000 tokens, {TITLES['http' if engine == 'nybble' else engine]}",
                f"{row['miss_s']:.2f} s new, {1000 * row['hit_s']:.0f} ms seen: 1/{row['ratio']:.0f}",
                wanted,
            )
        )
    if "arrival" in found:
        row = found["arrival"]
        rows.append(
            (
                "time between tokens of 8 streams, p50 / p99: alone",
                f"{1000 * row['alone_p50_s']:.0f} / {1000 * row['alone_p99_s']:.0f} ms",
                "",
            )
        )
        rows.append(
            (
                "the same beside prompts of 2,000 tokens, p50 / p99 / most",
                " / ".join(f"{1000 * row[f'beside_{name}_s']:.0f}" for name in ("p50", "p99", "max")) + " ms",
                "one step's budget",
            )
        )
    if "native" in found:
        outside = found["native"]["outside_b1"]
        rows.append(
            (
                "time outside native code, 1 stream / 32 streams",
                f"{outside:.1%} / {found['native']['outside_b32']:.1%}",
                f"<= 3 % at 1, {verdict(outside <= MAX_OUTSIDE)}",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="runs.jsonl")
    parser.add_argument("--out", type=Path, help="where the JSON document goes, without its ending")
    parser.add_argument("--versions", nargs="*", default=[], help="of the peers, for the document")
    args = parser.parse_args()
    runs: Runs = defaultdict(list)
    for path in args.runs:
        for line in path.read_text("utf-8").splitlines():
            run = json.loads(line)
            runs[run["piece"]].append(run)
    found = summarise(runs)
    if args.out:
        document = {
            "date": datetime.date.today().isoformat(),
            "cpu": cpu_name(),
            "nybble": __version__,
            "peers": args.versions,
            "summary": found,
            "runs": [run for rows in runs.values() for run in rows],
        }
        args.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    print(tables(found), end="")


if __name__ == "__main__":
    main()
