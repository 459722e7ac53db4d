"""What training recovers: distillation of a model without some layers, and quantisation in the loop against rounding.

    python bench/train_table.py --reference FOLDER --text wikitext-2/test.txt --work DIR [--only REGEX]
                                [--natural wikitext-2/valid.txt [--other other.jsonl]]

FOLDER is a float16 Hugging Face folder. Rows are trained on text that the reference wrote itself (docs/train.md), on
the one that --natural names, or on that one and another (`natural_text.py` makes the file of --other), with the
teacher's likeliest tokens kept once for all rows. Rows that train.json holds are not taken again, so that the run can
be cut into pieces; interrupted training goes on. Writes train.md and train.json into docs/benchmarks.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- bench/train_table.py writes all that follows -->"
TOP_K = 128
STEP_TOKENS = 512
DISTIL_TOKENS = 430_080
GROUP_32 = ("--group-size", "32")
# What is trained on besides the model's own text, by the end of the row's name, and how its title says so.
OWN, NATURAL, BOTH, MANY, AFTER = "", "-natural", "-both", "-many", "-after"
TEXTS = {
    OWN: "on its own text",
    NATURAL: "on Wikipedia",
    BOTH: "on Wikipedia and its own text",
    MANY: "on Wikipedia and other texts",
    AFTER: "on Wikipedia, other texts and what it wrote after passages of Wikipedia",
}
MIXED_TOKENS = {BOTH: 716_800, MANY: 614_400, AFTER: 819_200}
# One sequence as long as the windows that are measured, in place of two half as long.
LONG = ("--seq-len", "512", "--batch", "1")

Document = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """before: the file that training is compared with; after: the trained one. goal: share of the KL to recover.

    prune: how `before` is made of the reference, which then teaches it; without, it is rounded to type. steps: updates
    of 512 tokens. text: of TEXTS. training: more options of the run.
    """

    name: str
    title: str
    goal: float
    steps: int
    rate: float
    type: str = ""
    options: tuple[str, ...] = ()
    prune: tuple[str, ...] = ()
    text: str = OWN
    training: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of the text. Distillation takes part of one that is kept with what the teacher says about it."""
        if self.text in MIXED_TOKENS:
            return MIXED_TOKENS[self.text]
        return DISTIL_TOKENS if self.prune else self.steps * STEP_TOKENS * 6 // 5

    @property
    def before(self) -> str:
        return f"{self.name.removesuffix(self.text)}-before{self._suffix}"

    @property
    def after(self) -> str:
        return f"{self.name}-after{self._suffix}"

    @property
    def _suffix(self) -> str:
        return ".gguf" if self.type.startswith("Q") else ""


ROWS = [
    Row("int4", "int4, groups of 32: rounded, trained", 0.4, 100, 1e-4, "int4", GROUP_32),
    Row("int2", "int2, groups of 32: rounded, trained", 0.6, 100, 3e-4, "int2", GROUP_32),
    Row("q2k", "Q2_K: importance matrix, trained", 0.4, 100, 1e-4, "Q2_K"),
    *(
        Row(
            f"{name}{end}",
            f"{words}: pruned, distilled {TEXTS[end]}",
            0.6,
            steps,
            1.5e-4,
            prune=prune,
            text=end,
            training=LONG if end == AFTER else (),
        )
        for name, words, prune, runs in (
            (
                "depth-3",
                "3 of 30 layers less",
                ("--drop-layers", "3"),
                {OWN: 450, NATURAL: 1400, BOTH: 1400, MANY: 1200, AFTER: 1600},
            ),
            ("depth-6", "6 of 30 layers less", ("--drop-layers", "6"), {OWN: 450, NATURAL: 560}),
            ("ffn-75", "a quarter of the neurons less", ("--ffn-width", "0.75"), {OWN: 450, NATURAL: 1400}),
        )
        for end, steps in runs.items()
    ),
]


class Maker:
    """Makes the files of a row."""

    def __init__(self, reference: Path, work: Path, natural: Path | None, other: Path | None) -> None:
        self.reference, self.work, self.natural, self.other = reference, work, natural, other

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
        if row.prune:
            self.nybble("prune", self.reference, target, *row.prune)
        else:
            more = ["--imatrix", self.imatrix()] if row.type.startswith("Q") else []
            self.nybble("quantize", self.reference, target, "--to", row.type, *row.options, *more)

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
        own = self.work / "self.jsonl"
        kinds = {
            OWN: [own],
            NATURAL: [self.natural],
            BOTH: [self.natural, own],
            MANY: [self.natural, self.other],
            AFTER: [self.natural, self.other, f"self:{self.natural}"],
        }
        cache = f"cache-{row.tokens}{row.text}"
        common = [
            *(part for text in kinds[row.text] for part in ("--data", text)),
            "--tokens", row.tokens, "--top-k", TOP_K, "--cache", self.work / cache,
            "--steps", row.steps, "--lr", row.rate, "--resume", *row.training,
        ]  # fmt: skip
        if row.prune:
            self.nybble("distil", self.work / row.before, target, "--teacher", self.reference, *common)
            return
        to = ["--to", row.type, *row.options]
        self.nybble("qat", self.reference, target, *to, "--imatrix", self.imatrix(), *common)

    def evaluate(self, row: Row, text: Path, tokens: int) -> Document:
        shape = ("--text", text, "--against", self.reference, "--tokens", tokens, "--json")
        found: Document = json.loads(self.nybble("eval", row.before, row.after, *shape).strip().splitlines()[-1])
        return found


def own_text(reference: Path, work: Path) -> None:
    """What the reference writes, as lines of JSON and as one text."""
    if (work / "self.jsonl").exists():
        return
    from nybble.checkpoint import open_checkpoint
    from nybble.compress.calibration.own_text import write_own_text
    from nybble.compress.methods import Silent
    from nybble.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(open_checkpoint(reference).tokenizer)
    tokens = max(row.tokens for row in ROWS if row.text == OWN)
    texts = [tokenizer.decode(document) for document in write_own_text(reference, tokens, 0, Silent())]
    (work / "self.txt").write_text("\n\n".join(texts), "utf-8")
    (work / "self.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


def log_of(path: Path) -> list[dict[str, Any]]:
    log = path / "train.jsonl" if path.is_dir() else path.with_name(f"{path.stem}.train.jsonl")
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]


def take(row: Row, maker: Maker, document: Document, text: Path, tokens: int) -> None:
    """Make and measure a row, under the conditions of those that the document has."""
    maker.before(row)
    maker.after(row)
    found = maker.evaluate(row, text, tokens)
    if document.setdefault("conditions", found["conditions"]) != found["conditions"]:
        raise SystemExit(f"the document was taken under other conditions: {document['conditions']}")
    document |= {key: found[key] for key in ("confidence", "reference", "metrics_version", "version")}
    before, after = ({**one, "name": Path(one["name"]).name} for one in found["models"])
    log = log_of(maker.work / row.after)
    document["rows"][row.name] = {"date": time.strftime("%Y-%m-%d"), "before": before, "after": after, "log": log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--natural", type=Path, help="text that people wrote, other than --text; without, no such rows")
    parser.add_argument("--other", type=Path, help="more of that kind; without, no rows that train on it")
    parser.add_argument("--only", default="", help="rows whose name this regular expression is found in")
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    work, reference, text, out = (path.resolve() for path in (args.work, args.reference, args.text, args.out))
    path = out / "train.json"
    document: Document = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": {}}
    natural, other = (path and path.resolve() for path in (args.natural, args.other))
    wanted = [row for row in ROWS if row.name not in document["rows"] and re.search(args.only, row.name)]
    wanted = [row for row in wanted if natural or row.text == OWN]
    wanted = [row for row in wanted if other or row.text not in (MANY, AFTER)]
    if any(row.text in (OWN, BOTH) for row in wanted):
        own_text(reference, work)
    for row in wanted:
        take(row, Maker(reference, work, natural, other), document, text, args.eval_tokens)
        path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
        write_page(out / "train.md", markdown(document))


def write_page(path: Path, table: str) -> None:
    """Replace what stands below the mark; what somebody wrote above it stays."""
    above = path.read_text("utf-8").partition(MARK)[0] if path.exists() else ""
    path.write_text(f"{above}{MARK}\n\n{table}", "utf-8")


def markdown(document: Document) -> str:
    """The table, with the budget of every row."""
    reference = document["reference"]["quality"]["perplexity"]
    name = Path(str(document["reference"]["name"])).name
    lines = [
        f"{name}, trained on text that it wrote itself or, where the row says Wikipedia, on the validation part of",
        "WikiText-2: 273,664 tokens, which 1400 steps read more than twice; other texts are those of",
        "`bench/natural_text.py`. Made by `bench/train_table.py`; figures are in `train.json`, with the curve of every",
        "run. KL: mean divergence on the test part of WikiText-2 from the float16 reference, whose perplexity there is",
        f"{_number(reference, 2)}.\n",
        "| what | KL before | KL after | recovered | goal | perplexity before | after | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        if row.name not in document["rows"]:
            continue
        taken = document["rows"][row.name]
        a, b, log = taken["before"], taken["after"], taken["log"]
        kl = [one["loss"]["mean_kl"] for one in (a, b)]
        share = 1 - kl[1]["value"] / kl[0]["value"]
        spent = f"{len(log)} steps of {STEP_TOKENS} tokens, {log[-1]['seconds'] / 60:.0f} min"
        cells = [_number(one, 4) for one in kl], [_number(one["quality"]["perplexity"], 2) for one in (a, b)]
        lines.append(
            f"| {row.title} | {cells[0][0]} | {cells[0][1]} | **{share:.0%}** | {row.goal:.0%} | {cells[1][0]} | "
            f"{cells[1][1]} | {spent} |"
        )
    missing = [row.title for row in ROWS if row.name not in document["rows"]]
    if missing:
        lines.append(f"\nNot taken yet: {'; '.join(missing)}.")
    return "\n".join(lines) + "\n"


def _number(estimate: dict[str, Any], digits: int) -> str:
    low, high = estimate["low"], estimate["high"]
    margin = "" if low is None or high is None else f" ±{(high - low) / 2:.{digits}f}"
    return f"{estimate['value']:.{digits}f}{margin}"


if __name__ == "__main__":
    main()
