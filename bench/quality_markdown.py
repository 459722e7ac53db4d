"""The quality table as Markdown, and whether the orders that one expects hold."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from nybble.evaluate.bootstrap import Bootstrap
from nybble.evaluate.table import significant

Document = dict[str, Any]
COLUMNS = (
    "file", "MB", "bits", "of layers", "of F16", "perplexity / reference's", "KL mean", "median", "p99", "same top",
    "flips", "llama.cpp",
)  # fmt: skip
OWN_TEXT = " --calibrate self"
KINDS = ("", " --asymmetric")  # of rounding


def markdown(document: Document, order: list[str]) -> str:
    """All rows by name in this order, then the expected orders."""
    rows = [document["rows"][name] for name in order if name in document["rows"]]
    conditions, reference = document["conditions"], document["reference"]
    begin = "BOS first" if conditions["bos"] else "no BOS"
    last, size = conditions["ctx"] - 1, f"{reference['bytes'] / 1e6:.1f} MB"
    lines = [
        f"## {document['model']}",
        "",
        f"{conditions['text']} (SHA-256 {conditions['text_sha256'][:16]}), {conditions['windows']} windows of "
        f"{conditions['ctx']} tokens, {begin}, tokens {conditions['score_from']} to {last} of "
        f"each scored, {conditions['scored_tokens']} in all; activations in "
        f"{conditions['activations']}. The reference has a perplexity of "
        f"{_bounds(reference['quality']['perplexity'])} and "
        f"{size}. In brackets: 95 % intervals from {conditions['blocks']} blocks.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *(_line(row, document["rows"]) for row in rows if not _is_twin(row)),
        "",
        "## Expected orders",
        "",
        "Differences of the mean KL divergence, left less right, with 95 % intervals over the same blocks of text.",
        "",
        "| expected | left - right | |",
        "|---|---|---|",
        *(line for left, right in expected(document["rows"]) for line in [_order(document["rows"], left, right)]),
        "",
    ]
    return "\n".join(lines)


def _is_twin(row: Document) -> bool:
    """llama-quantize made the same tensors: a mark in our row says it."""
    return row["tool"] == "llama.cpp" and str(row.get("same_tensors_as", "")).startswith("nybble")


def _line(row: Document, rows: dict[str, Document]) -> str:
    loss = row["loss"]
    twin = rows.get(row["name"].replace("nybble", "llama.cpp"))
    figures = [f"{row['bytes'] / 1e6:.1f}", f"{row['bpw']:.2f}", f"{row['linear_bpw']:.2f}"]
    figures.append(f"{row['linear_bpw'] / 16:.1%}")
    figures += [_ratio(loss["perplexity_ratio"]), _bounds(loss["mean_kl"])]
    figures += [significant(loss[key]["value"], 3) for key in ("median_kl", "p99_kl")]
    figures += [_percent(loss[key]) for key in ("top1_agreement", "flips")]
    figures.append("" if twin is None or row["tool"] != "nybble" else "same" if _is_twin(twin) else "below")
    return f"| {row['name'].removeprefix('nybble ')} | {' | '.join(figures)} |"


def _ratio(estimate: Document) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _bounds(estimate: Document) -> str:
    digits = 4 if estimate["value"] > 1 else 3
    value, low, high = (significant(estimate[key], digits) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _percent(estimate: Document) -> str:
    return f"{estimate['value']:.1%} [{estimate['low'] * 100:.1f}, {estimate['high'] * 100:.1f}]"


def expected(rows: dict[str, Document]) -> list[tuple[str, str]]:
    """Pairs of rows, of which the left one should lose no more than the right one."""
    ladder = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    pairs = [(f"nybble {a}", f"nybble {b}") for a, b in pairwise(ladder)]
    pairs += [("nybble int8", "nybble int4"), ("nybble int4", "nybble int3"), ("nybble int3", "nybble int2")]
    pairs.append(("nybble nf4", "nybble fp4"))
    pairs += [(name, name.removesuffix(OWN_TEXT)) for name in rows if name.endswith(OWN_TEXT)]
    for name, row in rows.items():
        plain = name.replace(" imatrix", "")
        if row["imatrix"] and not _is_twin(row):
            pairs.append((name, plain))
        if row["tool"] == "llama.cpp" and "same_tensors_as" not in row:
            pairs.append((name.replace("llama.cpp", "nybble"), name))
    for bits in (4, 3, 2):
        plain, asymmetric = f"nybble int{bits}", f"nybble int{bits} --asymmetric"
        pairs += [(asymmetric, plain), (plain, f"{plain} --clip-search"), (asymmetric, f"{asymmetric} --clip-search")]
        gptq = [f"nybble gptq-{bits}bit{text}" for text in ("", OWN_TEXT)]
        pairs += [(left, right) for left in gptq for right in (plain, asymmetric)]
    pairs += [("nybble gptq-8bit", "nybble int8")]
    pairs += [(f"nybble awq-4bit{text}", f"nybble int4{kind}") for text in ("", OWN_TEXT) for kind in KINDS]
    return [(left, right) for left, right in pairs if left in rows and right in rows]


def _order(rows: dict[str, Document], left: str, right: str) -> str:
    difference = np.array(rows[left]["block_kl"]) - np.array(rows[right]["block_kl"])
    estimate = Bootstrap(np.arange(difference.size)).mean(difference)
    verdict = "holds" if estimate.high <= 0 else "**violated**" if estimate.low > 0 else "cannot be told apart"
    figures = f"{_signed(estimate.value)} [{_signed(estimate.low)}, {_signed(estimate.high)}]"
    names = " <= ".join(name.removeprefix("nybble ") for name in (left, right))
    return f"| {names} | {figures} | {verdict} |"


def _signed(value: float) -> str:
    return ("-" if value < 0 else "+") + significant(abs(value), 3)
