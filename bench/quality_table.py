#!/usr/bin/env python3
"""What every type costs: all of them made of one reference, and all read the same text beside it.

    python bench/quality_table.py --reference DIR --text FILE --work DIR --json FILE [--llama-bin DIR]
                                  [--only REGEX] [--limit N] [--tokens 8192] [--samples 64] [--markdown FILE]

DIR is a float16 Hugging Face folder whose weights lie on no grid. The calibration text is nybble's default, which comes
with Python; the test text is read by nothing but `nybble eval`. Rows that the JSON document holds are not measured
again, so that the run can be cut into pieces: --limit N stops after N new rows. Files are removed once they have been
measured. llama-quantize's rows are made with the same importance matrix; where all tensors of a file equal those of one
that was measured, its figures are taken over, which the row says.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from quality_markdown import markdown
from quality_rows import NYBBLE, Row, Workshop, all_rows, run, tensors_digest

BATCH = 8  # rows per run of `nybble eval`, which reads the reference once
MARK = "<!-- bench/quality_table.py writes all that follows -->"

Document = dict[str, Any]


def measure(args: argparse.Namespace, paths: list[Path]) -> Document:
    """The JSON document of one `nybble eval`."""
    command = [NYBBLE, "eval", *paths, "--text", args.text, "--against", args.reference, "--ctx", args.ctx]
    output = run([*command, "--tokens", args.tokens, "--threads", args.threads, "--json"])
    found: Document = json.loads(output.splitlines()[-1])
    return found


def add(document: Document, found: Document, rows: list[tuple[Row, str | None]]) -> None:
    """Put measured rows into the document, which must have been taken under the same conditions."""
    if document.setdefault("conditions", found["conditions"]) != found["conditions"]:
        raise SystemExit(f"the document was taken under other conditions: {document['conditions']}")
    document |= {key: found[key] for key in ("confidence", "reference", "metrics_version", "version")}
    for (row, digest), model in zip(rows, found["models"], strict=True):
        document["rows"][row.name] = _described(row, digest) | model | {"name": row.name}


def _described(row: Row, digest: str | None) -> Document:
    return {"tool": row.tool, "type": row.type, "imatrix": row.imatrix, "options": list(row.options), "tensors": digest}


def same_tensors(document: Document, row: Row, digest: str | None) -> bool:
    """Take the figures over from a row with the same tensors, if there is one."""
    for name, other in document["rows"].items():
        if digest is not None and other["tensors"] == digest:
            document["rows"][row.name] = other | _described(row, digest) | {"name": row.name, "same_tensors_as": name}
            return True
    return False


def save(document: Document, path: Path) -> None:
    """One row per line, so that a change of one is a change of one line."""
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(_rounded(row))}" for name, row in document["rows"].items())
    rest = json.dumps({key: _rounded(value) for key, value in document.items() if key != "rows"}, indent=1)
    part = path.with_suffix(".part")
    part.write_text(f'{rest.removesuffix("}").rstrip()},\n "rows": {{\n{rows}\n}}}}\n', "utf-8")
    part.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def take_rows(args: argparse.Namespace, document: Document) -> None:
    """Make and measure what is missing, a few at a time."""
    workshop = Workshop(args.reference, args.work, args.llama_bin, args.threads, args.samples)
    missing = [row for row in all_rows() if row.name not in document["rows"] and re.search(args.only, row.name)]
    if args.llama_bin is None:
        missing = [row for row in missing if row.tool == "nybble"]
    missing = missing[: args.limit]
    for at in range(0, len(missing), BATCH):
        waiting: list[tuple[Row, str | None]] = []
        twins: list[tuple[Row, str | None]] = []
        for row in missing[at : at + BATCH]:
            print(row.name, file=sys.stderr, flush=True)
            digest = tensors_digest(workshop.make(row))
            if digest is not None and any(digest == other for _, other in waiting):
                twins.append((row, digest))
            elif not same_tensors(document, row, digest):
                waiting.append((row, digest))
        if waiting:
            add(document, measure(args, [args.work / row.file_name for row, _ in waiting]), waiting)
        for row, digest in twins:
            same_tensors(document, row, digest)
        save(document, args.json)
        for row in missing[at : at + BATCH]:
            remove(args.work / row.file_name)


def write_tables(tables: str, path: Path) -> None:
    """Replace what stands below the mark; what somebody wrote above it stays."""
    above = path.read_text("utf-8").partition(MARK)[0] if path.exists() else ""
    path.write_text(f"{above}{MARK}\n\n{tables}", "utf-8")


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="for files on the way")
    parser.add_argument("--json", type=Path, required=True, help="read, and written after every batch")
    parser.add_argument("--markdown", type=Path, help="write the table")
    parser.add_argument("--llama-bin", type=Path, help="folder of llama.cpp's programs; without it no rows of its own")
    parser.add_argument("--only", default="", help="rows whose name this regular expression is found in")
    parser.add_argument("--limit", type=int, help="new rows at most")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=64, help="windows of 512 tokens to calibrate on")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    document: Document = json.loads(args.json.read_text("utf-8")) if args.json.exists() else {"rows": {}}
    document.setdefault("model", args.reference.name)
    take_rows(args, document)
    if args.markdown is not None:
        write_tables(markdown(document, [row.name for row in all_rows()]), args.markdown)


if __name__ == "__main__":
    main()
