#!/usr/bin/env python3
"""Speculation against none: tokens per second of whole answers, one text and eight at once, round by round.

Both engines run in every round, in turn, in processes of their own, on the same prompts, greedily; the texts must be
the same to the letter. A cell is the median over the rounds of the ratio of one round.

    python bench/speculate.py [--rounds 5] [--out docs/benchmarks] MODEL.gguf ...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nybble import LLM, SamplingParams, StructuredOutputsParams, __version__

MODES = ("off", "auto")
TARGETS = {"edit": (2.0, 1.3), "json": (1.5, None), "chat": (1.0, None), "random": (0.98, 0.98)}
MAX_TOKENS = 256
PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 20},
        "last_name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "profession": {"type": "string", "maxLength": 20},
        "city": {"type": "string", "maxLength": 20},
    },
    "required": ["first_name", "last_name", "age", "profession", "city"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {"people": {"type": "array", "minItems": 3, "maxItems": 3, "items": PERSON}},
    "required": ["people"],
    "additionalProperties": False,
}
PEOPLE = (
    "Anna Smith, aged 34, is a doctor in Paris. Bob Jones, aged 51, is a baker in Rome. Carla Diaz, aged 28, is a "
    "pilot in Madrid."
)
QUESTIONS = (
    "Explain how a refrigerator works.",
    "Write a short story about a lighthouse keeper.",
    "What are the causes of inflation?",
    "Describe the water cycle to a child.",
    "How do I bake bread at home?",
    "Compare trains and aeroplanes for travelling.",
    "What makes a good leader?",
    "Tell me about the history of chess.",
)


def source_code() -> str:
    """About 1,200 tokens of Python that every Python has."""
    import textwrap as module

    return Path(module.__file__).read_text()[3000:8000]


def tasks() -> dict[str, tuple[list[Any], dict[str, Any]]]:
    """For each kind of text: eight prompts (messages, or token ids) and the sampling parameters."""
    code = source_code()
    edits = [
        f"```python\n{code}\n```\nRepeat this code exactly, but call `{name}` `{name}_new`."
        for name in ("width", "text", "chunks", "lines", "cur_line", "cur_len", "indent", "self")
    ]
    as_chat = [[{"role": "user", "content": text}] for text in edits]
    extract = [[{"role": "user", "content": f"Extract the people of this text as JSON: {PEOPLE}"}]] * 8
    asked = [[{"role": "user", "content": text}] for text in QUESTIONS]
    noise = [[(7919 * i * (place + 3) + i * i) % 30_000 + 200 for i in range(64)] for place in range(8)]
    return {
        "edit": (as_chat, {}),
        "json": (extract, {"structured_outputs": StructuredOutputsParams(json=SCHEMA)}),
        "chat": (asked, {}),
        "random": (noise, {"temperature": 2.0, "seed": 5, "ignore_eos": True}),
    }


def answer(llm: LLM, prompts: list[Any], values: dict[str, Any]) -> tuple[float, str]:
    """Tokens per second after the first token of each, and a digest of the texts."""
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": MAX_TOKENS} | values))
    ask = llm.generate if isinstance(prompts[0][0], int) else llm.chat
    first = SamplingParams(**({"temperature": 0.0} | values | {"max_tokens": 1}))
    given = [{"prompt_token_ids": ids} for ids in prompts] if ask == llm.generate else prompts
    ask(given, first, use_tqdm=False)  # type: ignore[arg-type]  # the prompts are in the prefix cache from here on
    begin = time.perf_counter()
    outputs = ask(given, params, use_tqdm=False)  # type: ignore[arg-type]
    seconds = time.perf_counter() - begin
    text = "\0".join(output.outputs[0].text for output in outputs)
    count = sum(len(output.outputs[0].token_ids) for output in outputs)
    return count / seconds, hashlib.sha256(text.encode()).hexdigest()


def measure(model: Path, mode: str, kinds: list[str]) -> dict[str, Any]:
    """All cells of one mode."""
    llm = LLM(model, speculate=mode, max_model_len=4096, kv_cache_memory="2GiB")  # type: ignore[arg-type]
    cells: dict[str, Any] = {}
    for kind, (prompts, values) in tasks().items():
        if kind not in kinds:
            continue
        for batch in (1, 8):
            before = llm.engine_stats().speculation
            drafted, accepted = before.drafted, before.accepted
            speed, digest = answer(llm, prompts[:batch], values)
            after = llm.engine_stats().speculation
            cells[f"{kind}@b{batch}"] = {
                "tok_s": speed,
                "text": digest,
                "drafted": after.drafted - drafted,
                "accepted": after.accepted - accepted,
            }
    return cells


def compare(model: Path, rounds: int, kinds: list[str]) -> dict[str, Any]:
    """The table of one model."""
    found: list[dict[str, dict[str, Any]]] = []
    for number in range(rounds):
        one = {}
        for mode in MODES if number % 2 == 0 else reversed(MODES):
            command = [sys.executable, __file__, "--one", mode, "--kinds", ",".join(kinds), str(model)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            one[mode] = json.loads(done.stdout.splitlines()[-1])
        found.append(one)
        print(f"{model.stem}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    cells = {}
    for cell in found[0]["off"]:
        texts = {one[mode][cell]["text"] for one in found for mode in MODES}
        ratios = [one["auto"][cell]["tok_s"] / one["off"][cell]["tok_s"] for one in found]
        kind, batch = cell.split("@b")
        cells[cell] = {
            "off_tok_s": statistics.median(one["off"][cell]["tok_s"] for one in found),
            "auto_tok_s": statistics.median(one["auto"][cell]["tok_s"] for one in found),
            "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "target": TARGETS[kind][0 if batch == "1" else 1],
            "same_text": len(texts) == 1,
            "drafted": found[0]["auto"][cell]["drafted"],
            "accepted": found[0]["auto"][cell]["accepted"],
        }
    return {"model": model.name, "cells": cells}


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Speculation against none",
        "",
        f"nybble {report['version']}, `{report['command']}`: {report['rounds']} rounds, both in each round, greedy "
        f"({MAX_TOKENS} tokens at most), prompts in the prefix cache. `random` draws at temperature 2. A ratio is the "
        "median over the rounds.",
    ]
    for table in report["models"]:
        lines += ["", f"## {table['model']}", ""]
        lines += ["| text | off, tok/s | auto, tok/s | ratio (min to max) | target | guesses kept | same text |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, cell in table["cells"].items():
            ratio = cell["ratio"]
            kept = f"{cell['accepted']} of {cell['drafted']}" if cell["drafted"] else "none made"
            target = "" if cell["target"] is None else f"{cell['target']} x"
            lines.append(
                f"| {name.replace('@b', ', ')} | {cell['off_tok_s']:.1f} | {cell['auto_tok_s']:.1f} | "
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) | {target} | {kept} | "
                f"{'yes' if cell['same_text'] else 'NO'} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", default=",".join(TARGETS), help="of text, separated by commas")
    parser.add_argument("--out", type=Path, help="folder of the reports; none are written without it")
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if args.one:
        print(json.dumps(measure(args.models[0], args.one, kinds)))
        return
    report = {
        "version": __version__,
        "command": "bench/speculate.py " + " ".join(path.name for path in args.models),
        "rounds": args.rounds,
        "models": [compare(path, args.rounds, kinds) for path in args.models],
    }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "speculation.md").write_text(as_markdown(report))
        (args.out / "speculation.json").write_text(json.dumps(report, indent=1) + "\n")
    print(as_markdown(report), file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
