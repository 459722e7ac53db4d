#!/usr/bin/env python3
"""llama-server's own speculation against none, on the texts of speculate.py: what the peer gains where nybble gains.

Each mode runs in every round in a server of its own, greedily, the prompts in its cache before the clock starts.

    python bench/speculate_peer.py [--rounds 5] --llama-bin FOLDER [--draft DRAFT.gguf] [--out FOLDER] MODEL.gguf
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serve_engines import free_port, process
from speculate import MAX_TOKENS, SCHEMA, tasks

SLOTS, CONTEXT = 8, 4096  # a slot's context


def command(bin_dir: Path, model: Path, threads: int, port: int, mode: str, draft: Path | None) -> list[str]:
    """How llama-server is started for a mode: off, a type of its n-gram speculation, or draft."""
    base = [str(bin_dir / "llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "--offline"]
    base += ["-t", str(threads), "-tb", str(threads), "-np", str(SLOTS), "-c", str(SLOTS * CONTEXT)]
    if mode == "off":
        return base
    if mode == "draft":
        return [*base, "--spec-type", "draft-simple", "-md", str(draft), "--spec-draft-n-max", "8"]
    return [*base, "--spec-type", mode]


def ask(url: str, kind: str, prompt: Any, values: dict[str, Any], max_tokens: int, slot: int) -> int:
    """Let it answer; how many tokens it wrote."""
    sampling = {"temperature": values.get("temperature", 0.0), "seed": values.get("seed", 0)}
    if isinstance(prompt[0], int):
        body = {"prompt": prompt, "n_predict": max_tokens, "ignore_eos": True, "id_slot": slot, **sampling}
        return int(post(url + "/completion", body)["timings"]["predicted_n"])
    body = {"messages": prompt, "max_tokens": max_tokens, "id_slot": slot, **sampling}
    if kind == "json":
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "people", "schema": SCHEMA}}
    return int(post(url + "/v1/chat/completions", body)["usage"]["completion_tokens"])


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=900) as reply:
        return json.load(reply)


def measure(url: str, kinds: list[str], batches: list[int]) -> dict[str, float]:
    """Tokens per second of every kind of text, so many at once."""
    found = {}
    with ThreadPoolExecutor(SLOTS) as pool:
        for kind, (prompts, values) in tasks().items():
            if kind not in kinds:
                continue
            for batch in batches:

                def all_of(max_tokens: int, asked: list[Any], kind: str = kind, values: Any = values) -> int:
                    jobs = [pool.submit(ask, url, kind, one, values, max_tokens, i) for i, one in enumerate(asked)]
                    return sum(job.result() for job in jobs)

                all_of(1, prompts[:batch])
                begin = time.perf_counter()
                count = all_of(MAX_TOKENS, prompts[:batch])
                found[f"{kind}@b{batch}"] = count / (time.perf_counter() - begin)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--llama-bin", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--draft", type=Path, help="a smaller model with the same tokenizer")
    parser.add_argument("--ngram", default="ngram-simple", help="its kind of n-gram speculation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", default="edit,json,chat,random", help="of text, separated by commas")
    parser.add_argument("--batches", default=f"1,{SLOTS}", help=f"texts at once, at most {SLOTS}")
    parser.add_argument("--out", type=Path, help="folder of the report; none is written without it")
    args = parser.parse_args()
    batches = [int(one) for one in args.batches.split(",")]
    if not 0 < min(batches) <= max(batches) <= SLOTS:
        parser.error(f"--batches: 1 to {SLOTS}")
    modes = ["off", args.ngram] + (["draft"] if args.draft else [])
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(args.rounds):
        one = {}
        for mode in modes if number % 2 == 0 else modes[::-1]:
            port = free_port()
            url = f"http://127.0.0.1:{port}"
            with process(command(args.llama_bin, args.model, args.threads, port, mode, args.draft), url, "/health"):
                one[mode] = measure(url, args.kinds.split(","), batches)
        rounds.append(one)
        print(f"{args.model.stem}: round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    cells = {
        f"{mode}, {cell}": {
            "tok_s": statistics.median(one[mode][cell] for one in rounds),
            "ratio": statistics.median(one[mode][cell] / one["off"][cell] for one in rounds),
        }
        for mode in modes
        for cell in rounds[0]["off"]
    }
    report = {"model": args.model.name, "rounds": args.rounds, "peer": "llama-server 11434", "cells": cells}
    for name, cell in cells.items():
        print(f"| {name.replace('@b', ', ')} | {cell['tok_s']:.1f} | {cell['ratio']:.2f} |", file=sys.stderr)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"speculation-llama-{args.model.stem}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
