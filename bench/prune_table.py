#!/usr/bin/env python3
"""What pruning costs and what it saves: every way of it on one model, beside the model as it was.

    python bench/prune_table.py --reference DIR --text FILE --work DIR [--only REGEX] [--limit N] [--speed]
                                [--out docs/benchmarks]

DIR is a float16 Hugging Face folder. Calibration: nybble's default text, which comes with Python, 64 samples of 512
tokens for zeros and its 128 where layers, neurons or heads go; the test text is read by nothing but `nybble eval`.
Pruned models stay in the working folder, and rows that the JSON document holds are not measured again, so that the run
can be cut into pieces (--limit N stops after N new rows).
--speed measures decoding of the reference and of every narrower or shallower model in turns, five rounds, and nothing
else: let nothing else run then. Each run writes prune.json and prune.md anew.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NYBBLE = [sys.executable, "-c", "from nybble.cli.app import main; main()"]
CALIBRATION = ["--calibration-samples", "64", "--calibration-tokens", "512"]
OWN = ["--calibrate", "self", *CALIBRATION]
BARE = ["--compensate", "none"]
ROUNDS = 5
NEW_TOKENS = 32

Document = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """name: of the folder too. words: for people. smaller: it has fewer weights."""

    name: str
    words: str
    options: tuple[str, ...]
    smaller: bool = False


def zeros() -> list[Row]:
    """Every method at 30 %, 50 % and 2:4; half of the weights also with text that the model wrote."""
    found = []
    for label, words, share in (
        ("30", "30 %", ("--amount", "0.3")), ("50", "50 %", ("--amount", "0.5")), ("24", "2:4", ("--nm", "2:4")),
    ):  # fmt: skip
        for method in ("magnitude", "wanda", "sparsegpt"):
            more = () if method == "magnitude" else tuple(CALIBRATION)
            found.append(Row(f"{method}-{label}", f"{method}, {words} zeros", ("--method", method, *share, *more)))
            if method != "magnitude" and label == "50":
                options = ("--method", method, *share, *OWN)
                found.append(Row(f"{method}-{label}-own", f"{method}, {words} zeros, own text", options))
    return found


ROWS = [
    *zeros(),
    Row("depth-3", "3 of 30 layers, by influence", ("--drop-layers", "3"), True),
    Row("depth-6", "6 of 30 layers, by influence", ("--drop-layers", "6"), True),
    Row("depth-3-loss", "3 of 30 layers, by loss", ("--drop-layers", "3", "--by", "loss"), True),
    Row("depth-6-loss", "6 of 30 layers, by loss", ("--drop-layers", "6", "--by", "loss"), True),
    Row("ffn-75", "a quarter of the neurons, refit", ("--ffn-width", "0.75"), True),
    Row("ffn-75-none", "a quarter of the neurons, none", ("--ffn-width", "0.75", *BARE), True),
    Row("heads-67", "a third of the query heads, refit", ("--heads", "0.67"), True),
]  # fmt: skip


def run(arguments: list[str]) -> str:
    """The output of a nybble command."""
    done = subprocess.run([*NYBBLE, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"nybble {' '.join(arguments)} failed")
    return done.stdout


def measure(args: argparse.Namespace, document: Document) -> None:
    """Prune, and evaluate all new models at once beside the reference."""
    wanted = [row for row in ROWS if re.search(args.only, row.name) and row.name not in document["rows"]][: args.limit]
    for row in wanted:
        if not (args.work / row.name).exists():
            run(["prune", str(args.reference), str(args.work / row.name), "--resume", *row.options])
    if not wanted:
        return
    models = [str(args.work / row.name) for row in wanted]
    shape = ["--ctx", "512", "--tokens", str(args.tokens)]
    output = run(["eval", *models, "--text", str(args.text), "--against", str(args.reference), *shape, "--json"])
    found = json.loads(output.splitlines()[-1])
    if document.setdefault("conditions", found["conditions"]) != found["conditions"]:
        raise SystemExit(f"the document was taken under other conditions: {document['conditions']}")
    document["reference"] = found["reference"]
    for row, model in zip(wanted, found["models"], strict=True):
        document["rows"][row.name] = {**model, "name": row.name, "options": list(row.options)}


def measure_speed(args: argparse.Namespace, document: Document) -> None:
    """Tokens per second of one stream after 128 tokens; the models take turns."""
    rows = [row for row in ROWS if row.smaller and row.name in document["rows"]]
    paths = {"reference": args.reference, **{row.name: args.work / row.name for row in rows}}
    rates: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(ROUNDS):
        for name, path in paths.items():
            output = run(["bench", str(path), "-p", "0", "-n", str(NEW_TOKENS), "-b", "1", "--repeat", "1", "--json"])
            rates[name].append(json.loads(output.splitlines()[-1])["results"][0]["tok_s"]["median"])
    document["speed"] = {"rounds": ROUNDS, "new_tokens": NEW_TOKENS, "tok_s": rates}


def markdown(document: Document) -> str:
    """The page."""
    conditions, reference = document["conditions"], document["reference"]
    lines = [
        "# What pruning costs", "",
        f"smollm2-135m as a float16 folder, {reference['bytes'] / 1e6:.1f} MB. {conditions['text']}, "
        f"{conditions['windows']} windows of {conditions['ctx']} tokens, {conditions['scored_tokens']} tokens scored; "
        f"activations in {conditions['activations']}. The reference has a perplexity of "
        f"{bounds(reference['quality']['perplexity'], 2)}. In brackets: 95 % intervals. Nothing was trained. "
        "Calibrated on Python's documentation and source, or on the model's own text where the row says so. "
        "`bench/prune_table.py` writes this page.", "",
        "| pruned | MB | perplexity | KL mean | same top |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in ROWS:
        found = document["rows"].get(row.name)
        if found is not None:
            cells = [row.words, f"{found['bytes'] / 1e6:.1f}", bounds(found["quality"]["perplexity"], 2)]
            cells += [bounds(found["loss"]["mean_kl"], 3), f"{found['loss']['top1_agreement']['value']:.1%}"]
            lines.append(f"| {' | '.join(cells)} |")
    missing = [row.words for row in ROWS if row.name not in document["rows"]]
    if missing:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    return "\n".join([*lines, *speed_lines(document), ""])


def bounds(estimate: dict[str, float | None], digits: int) -> str:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    between = "" if low is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{value:.{digits}f}{between}"


def speed_lines(document: Document) -> list[str]:
    if "speed" not in document:
        return []
    rates = document["speed"]["tok_s"]
    typical = {name: statistics.median(values) for name, values in rates.items()}
    whole = document["reference"]["bytes"]
    lines = [
        "", "## What it saves", "",
        f"One stream, {document['speed']['new_tokens']} tokens after 128, float16, medians "
        f"of {document['speed']['rounds']} rounds in turns (min to max). The reference: {spread(rates['reference'])} "
        "tok/s. Time saved is to be at least 0.9 x the share of bytes that went.", "",
        "| pruned | tok/s | bytes less | time per token less | ratio |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in ROWS:
        if row.name in typical:
            less = 1 - document["rows"][row.name]["bytes"] / whole
            saved = 1 - typical["reference"] / typical[row.name]
            lines.append(f"| {row.words} | {spread(rates[row.name])} | {less:.1%} | {saved:.1%} | {saved / less:.2f} |")
    return lines


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--only", default="")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--speed", action="store_true")
    args = parser.parse_args()
    path = args.out / "prune.json"
    document: Document = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": {}}
    if args.speed:
        measure_speed(args, document)
    else:
        measure(args, document)
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    (args.out / "prune.md").write_text(markdown(document), "utf-8")


if __name__ == "__main__":
    main()
