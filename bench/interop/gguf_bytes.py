#!/usr/bin/env python3
"""Whether `nybble quantize` writes the files of llama.cpp's `llama-quantize`, byte by byte, one line per type.

Where whole files differ, the line says how many tensors do and which keys. llama.cpp gives MXFP4 to experts only, so
for that type its quantizer is told to give it to every matrix of the layers (`--tensor-type`).

    python bench/interop/gguf_bytes.py --bin LLAMA_CPP/build/bin [--imatrix FILE] MODEL-F16.gguf TYPE ...
"""

from __future__ import annotations

import argparse
import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

from nybble.formats.gguf import GgufFile

NYBBLE = "from nybble.cli.app import main; main()"


def differences(ours: Path, theirs: Path) -> tuple[list[str], list[str], int]:
    """Names of tensors whose type, shape or bytes differ, names of keys, and how many tensors there are."""
    a, b = GgufFile(ours), GgufFile(theirs)
    tensors = []
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        one, other = a.tensors.get(name), b.tensors.get(name)
        same = one is not None and other is not None and (one.format, one.shape) == (other.format, other.shape)
        if not same or one is None or other is None or a.data(one) != b.data(other):
            tensors.append(name)
    keys = [
        key
        for key in sorted(a.metadata.keys() | b.metadata.keys())
        if key not in a.metadata or key not in b.metadata or a.value_bytes(key) != b.value_bytes(key)
    ]
    return tensors, keys, len(a.tensors)


def peer_command(args: argparse.Namespace, kind: str, target: Path) -> list[str]:
    command = [str(args.bin / "llama-quantize"), "--allow-requantize"]
    if args.imatrix is not None:
        command += ["--imatrix", str(args.imatrix)]
    if kind == "MXFP4":
        command += ["--tensor-type", r"blk\..*=mxfp4"]
        kind = "MXFP4_MOE"
    return [*command, str(args.model), str(target), kind, str(args.threads)]


def compare(args: argparse.Namespace, kind: str, folder: Path) -> bool:
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    command = [sys.executable, "-c", NYBBLE, "quantize", str(args.model), str(ours)]
    command += ["--to", kind, "--force", "--threads", str(args.threads)]
    if args.imatrix is not None:
        command += ["--imatrix", str(args.imatrix)]
    for one in (command, peer_command(args, kind, theirs)):
        done = subprocess.run(one, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            print(f"{kind}: {one[0]} failed: {done.stdout[-300:]}{done.stderr[-300:]}")
            return False
    if filecmp.cmp(ours, theirs, shallow=False):
        print(f"{kind}: the same file, {ours.stat().st_size} bytes", flush=True)
        return True
    tensors, keys, count = differences(ours, theirs)
    print(f"{kind}: {len(tensors)} of {count} tensors differ {tensors[:3]}; keys: {keys}", flush=True)
    return not tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("types", nargs="+", metavar="TYPE")
    parser.add_argument("--bin", type=Path, required=True)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="a folder for the two files; they are removed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        same = [compare(args, kind, Path(folder)) for kind in args.types]
    raise SystemExit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
