"""What training recovers: distillation of a model without some layers, and quantisation in the loop against rounding.

    python bench/train_table.py --reference FOLDER --text wikitext-2/test.txt --work DIR [--rows int4,int2,q2k,depth]

FOLDER is a float16 Hugging Face folder. Every row is trained on the same text, which the reference wrote itself (see
docs/train.md), with the teacher's likeliest tokens kept once for all rows. Rows that are in DIR already are not made
again, and interrupted ones go on. Writes docs/benchmarks/train.md and train.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 61440
TOP_K = 128


@dataclass(frozen=True)
class Row:
    """before: the file that training is compared with; after: the trained one. goal: share of the KL to recover."""

    name: str
    title: str
    before: str
    after: str
    goal: float
    rate: float


ROWS = [
    Row("int4", "int4, groups of 32: rounded, trained", "rtn-int4", "qat-int4", 0.4, 1e-4),
    Row("int2", "int2, groups of 32: rounded, trained", "rtn-int2", "qat-int2", 0.6, 3e-4),
    Row("q2k", "Q2_K: importance matrix, trained", "imatrix-q2k.gguf", "qat-q2k.gguf", 0.4, 1e-4),
    Row("depth", "three of 30 layers less: pruned, distilled", "depth", "distilled", 0.6, 2e-4),
]


class Maker:
    """Makes the files of a row. steps: updates of 512 tokens."""

    def __init__(self, reference: Path, work: Path, steps: int) -> None:
        self.reference, self.work, self.steps = reference, work, steps

    def nybble(self, *arguments: object) -> str:
        code = "from nybble.cli.app import main; main()"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        print("nybble", *arguments, flush=True)
        done = subprocess.run(command, cwd=self.work, text=True, stdout=subprocess.PIPE, check=True)
        return done.stdout

    def before(self, row: Row) -> None:
        """What needs no training."""
        target = self.work / row.before
        if target.exists():
            return
        if row.name.startswith("int"):
            self.nybble("quantize", self.reference, target, "--to", row.name, "--group-size", 32)
        elif row.name == "q2k":
            self.nybble("quantize", self.reference, target, "--to", "Q2_K", "--imatrix", self.imatrix())
        else:
            self.nybble("prune", self.reference, target, "--drop-layers", 3)

    def imatrix(self) -> Path:
        path = self.work / "imatrix.gguf"
        if not path.exists():
            self.nybble("imatrix", self.reference, "--text", self.work / "self.txt", "--chunks", 40, "-o", path)
        return path

    def after(self, row: Row) -> None:
        """The trained file."""
        target = self.work / row.after
        if target.exists():
            return
        common = [
            "--data", self.work / "self.jsonl", "--tokens", TOKENS, "--top-k", TOP_K, "--cache", self.work / "cache",
            "--steps", self.steps, "--lr", row.rate, "--resume",
        ]  # fmt: skip
        if row.name == "depth":
            self.nybble("distil", self.work / row.before, target, "--teacher", self.reference, *common)
            return
        to = ["Q2_K"] if row.name == "q2k" else [row.name, "--group-size", 32]
        self.nybble("qat", self.reference, target, "--to", *to, "--imatrix", self.imatrix(), *common)

    def evaluate(self, names: list[str], text: Path, tokens: int) -> dict[str, Any]:
        said = self.nybble(
            "eval", *names, "--text", text, "--against", self.reference, "--tokens", tokens, "--json"
        )  # fmt: skip
        found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
        return found


def own_text(reference: Path, work: Path) -> None:
    """What the reference writes, as lines of JSON and as one text."""
    if (work / "self.jsonl").exists():
        return
    from nybble.checkpoint import open_checkpoint
    from nybble.cli.own_text import write_own_text
    from nybble.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(open_checkpoint(reference).tokenizer)
    texts = [tokenizer.decode(document) for document in write_own_text(reference, 100_000, 0)]
    (work / "self.txt").write_text("\n\n".join(texts), "utf-8")
    (work / "self.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def log_of(path: Path) -> list[dict[str, Any]]:
    log = path / "train.jsonl" if path.is_dir() else path.with_name(f"{path.stem}.train.jsonl")
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    work, reference, text = args.work.resolve(), args.reference.resolve(), args.text.resolve()
    own_text(reference, work)
    maker = Maker(reference, work, args.steps)
    rows = [row for row in ROWS if row.name in args.rows.split(",")]
    for row in rows:
        maker.before(row)
        maker.after(row)
    report = maker.evaluate([name for row in rows for name in (row.before, row.after)], text, args.eval_tokens)
    value = {"machine": platform.machine(), "date": time.strftime("%Y-%m-%d"), "steps": args.steps, "eval": report}
    value["logs"] = {row.name: log_of(work / row.after) for row in rows}
    (args.out / "train.json").write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    (args.out / "train.md").write_text(markdown(rows, value), "utf-8")


def markdown(rows: list[Row], value: dict[str, Any]) -> str:
    """The table, with the budget of every row."""
    results = {Path(str(one["name"])).name: one for one in value["eval"]["models"]}
    reference = value["eval"]["reference"]["quality"]["perplexity"]
    name = Path(str(value["eval"]["reference"]["name"])).name
    lines = [
        "# What training recovers\n",
        f"{name}, trained on text that it wrote itself. Made by `bench/train_table.py`; the figures are in",
        "`train.json`, with the curve of every run. KL: mean divergence on other text from the float16 reference,",
        f"whose perplexity there is {_number(reference, 2)}.\n",
        "| what | KL before | KL after | recovered | goal | perplexity before | after | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        a, b = results[row.before], results[row.after]
        kl = [one["loss"]["mean_kl"] for one in (a, b)]
        share = 1 - kl[1]["value"] / kl[0]["value"]
        log = value["logs"][row.name]
        spent = f"{len(log)} steps of 512 tokens, {log[-1]['seconds'] / 60:.0f} min"
        cells = [_number(one, 4) for one in kl], [_number(one["quality"]["perplexity"], 2) for one in (a, b)]
        lines.append(
            f"| {row.title} | {cells[0][0]} | {cells[0][1]} | **{share:.0%}** | {row.goal:.0%} | {cells[1][0]} | "
            f"{cells[1][1]} | {spent} |"
        )
    missing = [row.title for row in ROWS if row not in rows]
    if missing:
        lines.append(f"\nNot taken yet: {'; '.join(missing)}.")
    return "\n".join(lines) + "\n"


def _number(estimate: dict[str, Any], digits: int) -> str:
    low, high = estimate["low"], estimate["high"]
    margin = "" if low is None or high is None else f" ±{(high - low) / 2:.{digits}f}"
    return f"{estimate['value']:.{digits}f}{margin}"


if __name__ == "__main__":
    main()
