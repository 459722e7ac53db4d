#!/usr/bin/env python3
"""Products with low-bit weights beside torch's own: microseconds, bytes of weights per second, share of the ceiling.

Two tables: every encoding at 16 tokens, and a sweep over tokens for some. Each row is compared with torch's bfloat16
product of the same shape in the same run, and with torch's own low-bit product where it has one.

    python bench/gpu/products.py [--out docs/benchmarks/gpu] [--rounds 9] [--dry]

--dry: tiny shapes, to see that it runs where there is no GPU (with TRITON_INTERPRET=1 and NYBBLE_TORCH_OPS=triton).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import DEVICE, Work, facts, medians, save, write
from random_codes import MATRICES

from nybble.backends.torch.ops import kernels
from nybble.backends.torch.ops.low_bit.coded import Codes
from nybble.backends.torch.ops.low_bit.eight_bits import EightBitLinear

BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
SHAPES = [(11008, 4096), (4096, 11008), (4096, 4096)]  # out, in
SWEPT = ("W4A16 g128", "Q4_K", "Q6_K", "W8A8", "FP8xFP8")
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)


def eight_bits(name: str, n: int, k: int) -> EightBitLinear:
    kind = FP8 if name.startswith("FP8") else INT8
    if kind == INT8:
        weight = torch.randint(-127, 128, (n, k), dtype=INT8, device=DEVICE)
    else:
        weight = torch.randn(n, k, device=DEVICE).to(FP8)
    scale = torch.rand(1, n, device=DEVICE) * 0.01
    return EightBitLinear(name, weight, scale, k, threshold=6.0 if name == "LLM.int8" else 0.0)


def ours(name: str, n: int, k: int, x: torch.Tensor) -> tuple[Work, int]:
    """The product, and the bytes of its weights."""
    if name in MATRICES:
        codes: Codes = MATRICES[name](n, k, DEVICE)
        num_bytes = sum(part.numel() * part.element_size() for part in codes.tensors())
        return (lambda: kernels.product(x, codes)), num_bytes
    linear = eight_bits(name, n, k)
    return (lambda: kernels.product8(x, linear.weight, linear.scale, linear.threshold)), linear.bytes


def peer(name: str, n: int, k: int, x: torch.Tensor) -> Work | None:
    """Torch's own product of the same kind."""
    if name == "W4A16 g128":
        codes = torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device=DEVICE)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(k // 128, n, 2, device=DEVICE, dtype=BF16)
        return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)
    if name == "W8A8":
        a = torch.randint(-127, 128, (max(len(x), 32), k), dtype=INT8, device=DEVICE)
        b = torch.randint(-127, 128, (n, k), dtype=INT8, device=DEVICE)
        return lambda: torch._int_mm(a, b.t())
    if name == "FP8xFP8":
        a, b = x.to(FP8), torch.randn(n, k, device=DEVICE).to(FP8)
        one = torch.ones((), device=DEVICE)
        return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=BF16)
    return None


def measure(names: tuple[str, ...], m: int, n: int, k: int, rounds: int) -> list[dict[str, Any]]:
    x = torch.randn(m, k, device=DEVICE, dtype=BF16)
    dense = torch.randn(n, k, device=DEVICE, dtype=BF16)
    works: dict[str, Work] = {"bfloat16": lambda: F.linear(x, dense)}
    num_bytes = {"bfloat16": dense.numel() * 2}
    refused = {}
    for name in names:
        works[name], num_bytes[name] = ours(name, n, k, x)
        try:
            other = peer(name, n, k, x)
        except (RuntimeError, AttributeError) as error:  # this torch or GPU has no such product: its row says so
            refused[f"torch {name}"] = str(error).splitlines()[0][:200]
            continue
        if other is not None:
            works[f"torch {name}"], num_bytes[f"torch {name}"] = other, num_bytes[name]
    cells, failed = medians(works, rounds)
    plain = cells["bfloat16"]["us"]
    rows: list[dict[str, Any]] = [
        {
            "name": name, "m": m, "n": n, "k": k, **cell, "weight_bytes": num_bytes[name],
            "gb_s": (num_bytes[name] + 2 * m * (n + k)) / cell["us"] / 1e3, "tflops": 2 * m * n * k / cell["us"] / 1e6,
            "times_bfloat16": plain / cell["us"],
        }
        for name, cell in cells.items()
    ]  # fmt: skip
    return rows + [{"name": name, "m": m, "n": n, "k": k, "failed": why} for name, why in (refused | failed).items()]


def over_roofline(row: dict[str, Any], ceilings: dict[str, Any]) -> None:
    """How often the time that the bytes, or the arithmetic in bfloat16, would take at the measured ceilings fits."""
    if "us" in row:
        bytes_us = row["gb_s"] * row["us"] / ceilings["copy_gb_s"]
        flops_us = row["tflops"] * row["us"] / ceilings["matrix_bf16_tflops"]
        row["over_roofline"] = row["us"] / max(bytes_us, flops_us)


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "failed" in row:
            print(f"{row['name']:18} {row['m']:5} x {row['k']} -> {row['n']}: {row['failed']}")
        else:
            print(
                f"{row['name']:18} {row['m']:5} x {row['k']:5} -> {row['n']:5}: {row['us']:8.1f} us {row['gb_s']:7.0f} "
                f"GB/s {row['tflops']:6.1f} Tflop/s, {row['times_bfloat16']:5.2f} x bfloat16, "
                f"{row['over_roofline']:.2f} x roofline",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    shapes, tokens = ([(64, 512)], (1, 20)) if args.dry else (SHAPES, TOKENS)
    report: dict[str, Any] = facts() | {"benchmark": "gpu-products", "rounds": args.rounds, "rows": []}
    every = (*MATRICES, "W8A8", "LLM.int8", "FP8xFP8")
    plan = [(every, 16, *shapes[0]), *((SWEPT, 16, *shape) for shape in shapes[1:])]
    plan += [(SWEPT, m, *shapes[0]) for m in tokens if m != 16]
    for names, m, n, k in plan:
        rows = measure(names, m, n, k, args.rounds)
        for row in rows:
            over_roofline(row, report)
        show(rows)
        report["rows"] += rows
        save(report, args.out, "products")  # in case that time runs out
    write(report, args.out, "products")


if __name__ == "__main__":
    main()
