#!/usr/bin/env python3
"""Perplexity of nybble beside llama-perplexity's, on the same tokens in the same windows.

llama-perplexity cuts the tokens into windows of n_ctx, starts each from an empty context (its first token replaced by
BOS for models that have one) and scores the tokens n_ctx/2 + 1, ..., n_ctx - 1 of each. So does this. Every encoded
text is compared with llama.cpp's own before anything is scored.

    python bench/compare_perplexity.py --llama-bin DIR --text FILE MODEL.gguf ... [--windows 64] [--logs DIR]

The last line of standard output is a JSON document; the exit code is 1 if a model lies outside the tolerance.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from llama_cpp import LlamaServer, perplexity_log, read_perplexity

from nybble.engine.load import load_model
from nybble.evaluate.perplexity import perplexity

CTX = 512
TOLERANCE = 0.005


def peer_log(args: argparse.Namespace, model: Path) -> str:
    """llama-perplexity's output; kept in --logs, because it takes minutes per model."""
    kept = args.logs / f"ppl_{model.stem}.log" if args.logs else None
    if kept is not None and kept.exists() and "PPL =" in kept.read_text("utf-8"):
        return str(kept.read_text("utf-8"))
    log = perplexity_log(args.llama_bin, model, args.text, ctx=CTX, windows=args.windows, threads=args.threads)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(log, "utf-8")
    return log


def compare(args: argparse.Namespace, model: Path) -> dict[str, object]:
    loaded = load_model(model, threads=args.threads, context=CTX)
    text = args.text.read_text("utf-8")
    token_ids = loaded.tokenizer.encode(text, add_special=True)
    with LlamaServer(args.llama_bin, model, threads=args.threads) as server:
        theirs = server.tokenize(text, parse_special=False)
    scored = args.windows * CTX
    same_tokens = token_ids[:scored] == theirs[:scored]
    peer = read_perplexity(peer_log(args, model))
    if peer.windows != args.windows:
        raise SystemExit(f"llama-perplexity scored {peer.windows} windows of {model.name}, not {args.windows}")
    bos = loaded.checkpoint.bos_token_id if loaded.checkpoint.add_bos else None
    begin = time.perf_counter()
    own = perplexity(loaded.model, token_ids, ctx=CTX, bos=bos, count=args.windows, progress=_progress)
    print(f"\r\033[K{model.name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    return {
        "model": model.name,
        "nybble": own.perplexity,
        "llama_cpp": peer.perplexity,
        "difference": own.perplexity / peer.perplexity - 1,
        "std_error": own.std_error,
        "bos": bos is not None,
        "same_tokens": same_tokens,
        "scored_tokens": own.scored_tokens,
        "windows": own.windows,
    }


def _progress(done: int, total: int) -> None:
    print(f"\rwindow {done} of {total}", end="", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--llama-bin", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=64, help=f"windows of {CTX} tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--logs", type=Path, help="keep llama-perplexity's output here, and use what is there")
    args = parser.parse_args()
    rows = [compare(args, model) for model in args.models]
    print(f"{'model':24} {'nybble':>9} {'llama.cpp':>9} {'difference':>10}  tokens scored, BOS, same tokens")
    for row in rows:
        print(
            f"{row['model']:24} {row['nybble']:9.4f} {row['llama_cpp']:9.4f} {row['difference']:+10.3%}  "
            f"{row['scored_tokens']}, {row['bos']}, {row['same_tokens']}"
        )
    good = all(row["same_tokens"] and abs(float(str(row["difference"]))) <= TOLERANCE for row in rows)
    print(json.dumps({"text": args.text.name, "ctx": CTX, "tolerance": TOLERANCE, "ok": good, "results": rows}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
