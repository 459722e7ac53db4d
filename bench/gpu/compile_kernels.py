#!/usr/bin/env python3
"""Compile every kernel for a Hopper GPU, without one: registers, spilled bytes and shared memory of each.

    python bench/gpu/compile_kernels.py [--only paged] [--out FILE]

It starts the same functions as the engine does, at the shapes of a Llama-3-8B, on tensors without memory behind them
worth mentioning; Triton's launches are replaced by compilations. What Triton's interpreter accepts and the compiler
refuses is found here. Exit status 1: a kernel does not compile, or does not fit the shared memory of a multiprocessor.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from compile_cases import CASES
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

SHARED_LIMIT = 232448  # bytes, of one block on compute capability 9.0


class FakeDriver:
    """Says that there is a Hopper GPU; nothing is ever run on it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of local memory, where registers go that there is no room for."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": numbers["REG"], "spilled_bytes": numbers["STACK"] + numbers["LOCAL"]}


class Recorder:
    """Compiles instead of launching, and keeps what came out."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.case = ""
        self._seen: set[int] = set()

    def install(self) -> None:
        launch = JITFunction.run

        def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> object:
            begin = time.perf_counter()
            compiled = launch(kernel, *args, grid=grid, warmup=True, **options)
            if id(compiled) not in self._seen:
                self._seen.add(id(compiled))
                self._keep(kernel.__name__, compiled, time.perf_counter() - begin)
            return compiled

        JITFunction.run = compile_only

    def _keep(self, name: str, compiled: Any, seconds: float) -> None:
        ptx = compiled.asm["ptx"]
        row = {
            "case": self.case, "kernel": name, "warps": compiled.metadata.num_warps, "shared": compiled.metadata.shared,
            **resources(compiled.asm["cubin"]), "wgmma": ptx.count("wgmma.mma_async"),
            "mma": len(re.findall(r"\bmma\.sync", ptx)), "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
            "seconds": round(seconds, 2),
        }  # fmt: skip
        self.rows.append(row)
        print(
            f"{self.case:40} {name:22} regs {row['registers']:3} spilled {row['spilled_bytes']:5} shared "
            f"{row['shared']:6} wgmma {row['wgmma']:3} mma {row['mma']:4} {row['seconds']:5.1f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of the cases to compile")
    parser.add_argument("--out", type=Path, help="a JSON file of the table")
    args = parser.parse_args()
    warnings.simplefilter("error")  # as in the tests
    driver.set_active(FakeDriver())
    recorder = Recorder()
    recorder.install()
    failed = []
    for name, case in CASES.items():
        if not any(part in name for part in args.only):
            continue
        recorder.case = name
        failed += attempt(name, case)
    failed += [f"{row['case']}: {row['shared']} bytes" for row in recorder.rows if row["shared"] > SHARED_LIMIT]
    if args.out is not None:
        args.out.write_text(json.dumps({"torch": torch.__version__, "kernels": recorder.rows}, indent=1) + "\n")
    print("\n".join([f"{len(recorder.rows)} kernels", *failed]))
    sys.exit(1 if failed else 0)


def attempt(name: str, case: Callable[[], object]) -> list[str]:
    try:
        case()
    except triton.compiler.errors.CompilationError as error:
        return [f"{name} does not compile: {error}"]
    return []


if __name__ == "__main__":
    main()
