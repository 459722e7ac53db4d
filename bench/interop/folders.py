#!/usr/bin/env python3
"""Whether folders that nybble writes mean the same in transformers: logits of both over one text, a line per type.

Run it with an interpreter that has nybble, torch, transformers and, for the types that need them, compressed-tensors,
bitsandbytes and GPTQModel.

    python bench/interop/folders.py --text FILE [--tokens 256] [--keep DIR] HF_FOLDER TYPE[:OPTION] ...

TYPE may end in an option of `nybble quantize` without a value: `int4:asymmetric`, `gptq-4bit:desc-act`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from reading import decoder_logits, dequantized_logits, kernel_logits, row, tokens_of, transformers_logits

# GPTQModel's kernels for CPUs compute in 16 bits only.
COMPUTE = {"gptq": "bfloat16", "awq": "bfloat16"}

NYBBLE = "from nybble.cli.app import main; main()"


def make(source: Path, target: Path, kind: str, calibration: Path) -> None:
    name, *options = kind.split(":")
    command = [sys.executable, "-c", NYBBLE, "quantize", str(source), str(target), "--to", name]
    command += [f"--{option}" for option in options]
    if name.startswith(("gptq", "awq")):
        command += ["--calibrate", str(calibration), "--calibration-samples", "16"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-300:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("types", nargs="+", metavar="TYPE")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--keep", type=Path, help="keep the folders here; those that are there are not made again")
    args = parser.parse_args()
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
    ids = tokens_of(args.source, args.text, args.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in args.types:
            folder = (args.keep or Path(scratch)) / kind.replace(":", "-")
            try:
                if not folder.exists():
                    make(args.source, folder, kind, args.text)
                ours = decoder_logits(folder, ids)
                theirs = transformers_logits(folder, ids, COMPUTE.get(kind.split("-")[0], "float32"))
                pairs = [("decoder", ours, theirs), ("served", kernel_logits(folder, ids), theirs)]
                if kind.startswith(("nf4", "fp4", "llm-int8")):
                    pairs.append(("decoder, their weights expanded", ours, dequantized_logits(folder, ids)))
                print(row(kind, *pairs), flush=True)
            except Exception as e:  # a row that says why is the result
                print(f"{kind} | {type(e).__name__}: {str(e).strip().splitlines()[0][:200]}", flush=True)


if __name__ == "__main__":
    main()
