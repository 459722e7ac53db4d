#!/usr/bin/env python3
"""What keys and values in 8 bits cost and bring, against 16 bits: divergence, memory, and the time of a decode step.

The text is read once with each; the last 512 positions are compared. Then steps of one token per sequence are timed at
the end of the text, in turns. With several sequences each reads the text for itself, so that they share no block.

    python bench/kv_cache_type.py --text FILE [--tokens 4096] [--sequences 1] [--json FILE] MODEL.gguf ...
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nybble import __version__
from nybble.backends.cpu import CpuModel, Step
from nybble.checkpoint import open_checkpoint
from nybble.tokenizer import load_tokenizer

COMPARED, CHUNK, STEPS, BLOCK = 512, 256, 40, 16
TYPES = ("f16", "int8")


class Reader:
    """A model and the sequences that it reads, each in blocks of its own."""

    def __init__(self, path: Path, kv_cache_type: str, tokens: int, sequences: int) -> None:
        checkpoint = open_checkpoint(path)
        self.model = CpuModel.load(checkpoint, context=tokens + STEPS, kv_cache_type=kv_cache_type)  # type: ignore
        blocks = -(-(tokens + STEPS) // BLOCK)
        self.model.new_cache(blocks * sequences)
        self._tables = np.arange(blocks * sequences, dtype=np.int32).reshape(sequences, blocks)
        self._lengths = np.zeros(sequences, np.int32)

    def read(self, sequence: int, ids: list[int], rows: list[int]) -> npt.NDArray[np.float32]:
        return self._execute(ids, slice(sequence, sequence + 1), rows)

    def decode(self, token: int) -> None:
        """A step of one token for every sequence."""
        count = len(self._lengths)
        self._execute([token] * count, slice(0, count), list(range(count)))

    def _execute(self, ids: list[int], which: slice, rows: list[int]) -> npt.NDArray[np.float32]:
        lengths = self._lengths[which]
        each = len(ids) // len(lengths)
        starts = np.arange(0, len(ids) + 1, each, dtype=np.int32)
        step = Step(
            np.array(ids, np.int32), starts, lengths.copy(), self._tables[which], np.array(rows, np.int32), None
        )
        lengths += each
        return self.model.execute(step)

    def read_all(self, ids: list[int]) -> npt.NDArray[np.float64]:
        """Fill every sequence. Log-probabilities [COMPARED, vocabulary] behind the last tokens of the first."""
        for sequence in range(1, len(self._lengths)):
            for begin in range(0, len(ids), CHUNK):
                self.read(sequence, ids[begin : begin + CHUNK], [0])
        found = []
        for begin in range(0, len(ids), CHUNK):
            piece = ids[begin : begin + CHUNK]
            rows = [i for i in range(len(piece)) if begin + i >= len(ids) - COMPARED]
            logits = self.read(0, piece, rows or [len(piece) - 1])
            if rows:
                found.append(logits.astype(np.float64))
        logits = np.concatenate(found)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def measure(path: Path, text: str, tokens: int, sequences: int) -> dict[str, Any]:
    ids = load_tokenizer(open_checkpoint(path).tokenizer).encode(text[: tokens * 8], add_special=False)[:tokens]
    readers = {kind: Reader(path, kind, len(ids), sequences) for kind in TYPES}
    logprobs = {kind: reader.read_all(ids) for kind, reader in readers.items()}
    kl = (np.exp(logprobs["f16"]) * (logprobs["f16"] - logprobs["int8"])).sum(axis=1)
    seconds: dict[str, list[float]] = {kind: [] for kind in TYPES}
    for _ in range(STEPS):
        for kind, reader in readers.items():
            begin = time.perf_counter()
            reader.decode(ids[0])
            seconds[kind].append(time.perf_counter() - begin)
    sizes = {kind: reader.model.cache_bytes_per_block for kind, reader in readers.items()}
    return {
        "model": path.name,
        "tokens": len(ids),
        "sequences": sequences,
        "kl": {"mean": float(kl.mean()), "p99": float(np.quantile(kl, 0.99))},
        "same_top": float((logprobs["f16"].argmax(axis=1) == logprobs["int8"].argmax(axis=1)).mean()),
        "capacity": sizes["f16"] / sizes["int8"],
        "step_ms": {kind: statistics.median(values) * 1e3 for kind, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sequences", type=int, default=1, help="whose steps are timed together")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = [measure(path, args.text.read_text("utf-8"), args.tokens, args.sequences) for path in args.models]
    print("| model | context | sequences | KL mean | KL p99 | same top token | capacity | step, f16 | int8 | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in results:
        f16, int8 = row["step_ms"]["f16"], row["step_ms"]["int8"]
        print(
            f"| {row['model']} | {row['tokens']} | {row['sequences']} | {row['kl']['mean']:.4f} | "
            f"{row['kl']['p99']:.4f} | {row['same_top']:.1%} | {row['capacity']:.2f} x | "
            f"{f16:.1f} ms | {int8:.1f} ms | {f16 / int8:.2f} x |"
        )
    if args.json is not None:
        args.json.write_text(json.dumps({"version": __version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
