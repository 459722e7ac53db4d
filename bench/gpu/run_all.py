#!/usr/bin/env python3
"""All tables of the GPU, unattended: each script in a process of its own, within a limit of time for all together.

    python bench/gpu/run_all.py --out docs/benchmarks/gpu [--seconds 235] [--only products kernels] [--dry]

A script that fails or runs out of time leaves what it had, and the others go on. The log of each lies beside its JSON.
--dry: everything at tiny sizes, also where there is no GPU (in Triton's interpreter).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# In the order of what matters if time runs out; the share of the time that each may take at most.
SCRIPTS: dict[str, tuple[list[str], float]] = {
    "flash_attention": (["--sweep"], 0.3),
    "products": ([], 0.5),
    "kernels": ([], 0.3),
    "decode": (["--encodings", "BF16,Q4_K"], 0.5),
}
DRY: dict[str, list[str]] = {
    "flash_attention": ["--dry", "--rounds", "1"],
    "products": ["--dry", "--rounds", "1"],
    "kernels": ["--dry", "--rounds", "1"],
    "decode": ["--shape", "tiny", "--encodings", "Q4_K", "--context", "32", "--steps", "4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=235.0)
    parser.add_argument("--only", nargs="*", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if args.dry:
        environment |= {"TRITON_INTERPRET": "1", "NYBBLE_TORCH_OPS": "triton"}
    begin, summary = time.monotonic(), {}
    for name in args.only:
        options, share = SCRIPTS[name]
        left = min(args.seconds - (time.monotonic() - begin), args.seconds * share)
        if left < 5:
            summary[name] = "no time left"
            continue
        summary[name] = run(name, DRY[name] if args.dry else options, args.out, left, environment)
        print(f"{name}: {summary[name]}", flush=True)
    (args.out / "run_all.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    sys.exit(0 if all(said.startswith("done") for said in summary.values()) else 1)


def run(name: str, options: list[str], out: Path, seconds: float, environment: dict[str, str]) -> str:
    command = [sys.executable, str(HERE / f"{name}.py"), *options, "--out", str(out)]
    begin = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
    taken = time.monotonic() - begin
    return f"done in {taken:.0f} s" if code == 0 else f"failed with {code} after {taken:.0f} s: see {name}.log"


if __name__ == "__main__":
    main()
