#!/usr/bin/env python3
"""Whether llama.cpp loads and runs GGUF files that nybble wrote: the greedy text of both, a line per type.

The texts need not agree to the end: both round activations, each in its own way, so that a close call between two
tokens can go either way. The line says how many characters are the same.

    python bench/interop/generate.py --bin LLAMA_CPP/build/bin [--tokens 16] MODEL-F16.gguf TYPE ...
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from nybble import LLM, SamplingParams

NYBBLE = "from nybble.cli.app import main; main()"
PROMPT = "The capital of France is"


def theirs(bin_dir: Path, model: Path, tokens: int, threads: int) -> str:
    command = [str(bin_dir / "llama-completion"), "-m", str(model), "-p", PROMPT, "-n", str(tokens), "--temp", "0"]
    command += ["-no-cnv", "--no-display-prompt", "-t", str(threads), "--no-warmup", "--simple-io"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise SystemExit(f"llama-completion failed: {done.stderr[-400:]}")
    return done.stdout.removesuffix("\n\n").removesuffix(" [end of text]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("types", nargs="+", metavar="TYPE")
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    params = SamplingParams(max_tokens=args.tokens, temperature=0)
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.types:
            file = Path(folder) / "model.gguf"
            command = [sys.executable, "-c", NYBBLE, "quantize", str(args.model), str(file), "--to", kind, "--force"]
            subprocess.run(command, check=True, capture_output=True)
            peer = theirs(args.bin, file, args.tokens, args.threads)
            ours = LLM(str(file), threads=args.threads).generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text
            same = next((i for i, (a, b) in enumerate(zip(ours, peer, strict=False)) if a != b), len(ours))
            print(f"{kind} | {same} of {len(ours)} characters the same | {ours!r} | {peer!r}", flush=True)


if __name__ == "__main__":
    main()
