#!/usr/bin/env python3
"""The kernels of a decoding step other than products: bytes per second of each, beside torch's own way to do the same.

Paged attention at several batches and lengths, for caches of bfloat16, int8 and float8; the norm with its residual sum,
the gated activation, rope with the write to the cache, and the draw of a token. Shapes of a Llama-3-8B.

    python bench/gpu/kernels.py [--out docs/benchmarks/gpu] [--rounds 15] [--dry]

--dry: tiny shapes, to see that it runs where there is no GPU (with TRITON_INTERPRET=1 and NYBBLE_TORCH_OPS=triton).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import DEVICE, Work, facts, medians, save, write

from nybble.backends.cpu.step import SampleRow
from nybble.backends.torch.ops import kernels, reference
from nybble.backends.torch.ops.sampling.columns import make_columns

BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
BLOCK = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model, and what is measured of it."""

    heads: int
    kv_heads: int
    width: int
    hidden: int
    ffn: int
    vocab: int
    tokens: tuple[int, ...]
    decodes: tuple[tuple[int, int], ...]  # sequences, keys of each
    chunk: tuple[int, int]  # queries, keys


REAL = Sizes(
    32, 8, 128, 4096, 14336, 128256, (1, 64, 4096), ((1, 4096), (1, 32768), (32, 2048), (128, 2048)), (2048, 8192)
)
DRY = Sizes(4, 2, 16, 64, 96, 500, (2,), ((2, 70),), (20, 40))


class Paged:
    """A filled cache."""

    def __init__(self, sizes: Sizes, sequences: int, keys: int, q_len: int, kind: torch.dtype) -> None:
        blocks = -(-keys // BLOCK)
        shape = (sequences * blocks, BLOCK, sizes.kv_heads, sizes.width)
        self.scales = [torch.zeros(shape[:3], device=DEVICE) if kind in (INT8, FP8) else None for _ in "kv"]
        self.caches = [torch.zeros(shape, dtype=BF16, device=DEVICE).to(kind) for _ in "kv"]
        slots = torch.arange(sequences * blocks * BLOCK, device=DEVICE)
        for cache, scale in zip(self.caches, self.scales, strict=True):
            rows = torch.randn(len(slots), sizes.kv_heads, sizes.width, device=DEVICE, dtype=BF16)
            reference.store(rows, cache, scale, slots)
        self.q = torch.randn(sequences * q_len, sizes.heads, sizes.width, device=DEVICE, dtype=BF16)
        self.tables = torch.randperm(sequences * blocks, device=DEVICE).int().view(sequences, blocks)
        self.cu = torch.arange(0, sequences * q_len + 1, q_len, dtype=torch.int32, device=DEVICE)
        self.lens = torch.full((sequences,), keys, dtype=torch.int32, device=DEVICE)
        self.q_len = q_len
        stored = [*self.caches, *(scale for scale in self.scales if scale is not None)]
        self.num_bytes = sum(part.numel() * part.element_size() for part in stored) * keys // (blocks * BLOCK)

    def run(self) -> object:
        return kernels.paged_attention(
            self.q, *self.caches, self.tables, self.cu, self.lens, sm_scale=self.q.shape[2] ** -0.5, window=None,
            softcap=None, k_scale=self.scales[0], v_scale=self.scales[1], max_q_len=self.q_len, num_decodes=0,
        )  # fmt: skip


def attention(sizes: Sizes, sequences: int, keys: int, q_len: int) -> tuple[dict[str, Work], dict[str, int]]:
    """Ours on three caches; torch's on keys and values that lie in one piece."""
    works: dict[str, Work] = {}
    num_bytes = {}
    for kind in (BF16, INT8, FP8):
        paged = Paged(sizes, sequences, keys, q_len, kind)
        name = f"paged {str(kind).removeprefix('torch.')}"
        works[name], num_bytes[name] = paged.run, paged.num_bytes
    q = torch.randn(sequences, sizes.heads, q_len, sizes.width, device=DEVICE, dtype=BF16)
    k, v = (torch.randn(sequences, sizes.kv_heads, keys, sizes.width, device=DEVICE, dtype=BF16) for _ in "kv")
    causal = q_len > 1 and q_len == keys  # torch's is_causal is upper left otherwise
    works["torch"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    num_bytes["torch"] = 2 * k.numel() * 2
    return works, num_bytes


def small(sizes: Sizes, tokens: int) -> tuple[dict[str, Work], dict[str, int]]:
    """What stands between the products of a layer."""
    x, residual = (torch.randn(tokens, sizes.hidden, device=DEVICE, dtype=BF16) for _ in "ab")
    weight = torch.randn(sizes.hidden, device=DEVICE, dtype=BF16)
    gate, up = (torch.randn(tokens, sizes.ffn, device=DEVICE, dtype=BF16) for _ in "ab")
    q, k, v = (
        torch.randn(tokens, n, sizes.width, device=DEVICE, dtype=BF16) for n in (sizes.heads, *[sizes.kv_heads] * 2)
    )
    cos = torch.randn(tokens, sizes.width // 2, device=DEVICE)
    slots = torch.arange(tokens, device=DEVICE)
    caches = [torch.zeros(-(-tokens // BLOCK), BLOCK, *k.shape[1:], device=DEVICE, dtype=BF16) for _ in "kv"]
    rope = (q, k, v, cos, cos, sizes.width, False, *caches, slots, None, None, 1e-5, None, None)
    works: dict[str, Work] = {
        "norm": lambda: kernels.rms_norm(x, weight, 1e-5, residual),
        "torch norm": lambda: F.rms_norm(x + residual, (sizes.hidden,), weight, 1e-5),
        "gated": lambda: kernels.gated_activation(gate, up, "silu"),
        "torch gated": lambda: F.silu(gate) * up,
        "rope and write": lambda: kernels.rope_store_kv(*rope),
        "torch rope and write": lambda: reference.rope_store_kv(*rope),
    }
    norm, gated, roped = 8 * x.numel(), 6 * gate.numel(), 4 * (q.numel() + k.numel() + v.numel())
    return works, dict(zip(works, (norm, norm, gated, gated, roped, roped), strict=True))


def draws(sizes: Sizes, tokens: int) -> tuple[dict[str, Work], dict[str, int]]:
    """One token of each row."""
    logits = torch.randn(tokens, sizes.vocab, device=DEVICE) * 3
    kinds = {
        "greedy": SampleRow(0),
        "temperature": SampleRow(1.0, seed=1),
        "top_p": SampleRow(1.0, top_p=0.95, seed=1),
        "top_k and top_p": SampleRow(1.0, top_k=50, top_p=0.95, seed=1),
    }
    works: dict[str, Work] = {}
    for name, row in kinds.items():
        columns = make_columns([row] * tokens, DEVICE)
        works[f"draw {name}"] = lambda columns=columns: kernels.draw(logits, columns)
    works["torch sort"] = lambda: torch.sort(logits, dim=1, descending=True)
    return works, dict.fromkeys(works, logits.numel() * 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny shapes")
    args = parser.parse_args()
    sizes = DRY if args.dry else REAL
    report: dict[str, Any] = facts() | {"benchmark": "gpu-kernels", "rounds": args.rounds, "rows": []}
    plan: list[tuple[str, Any]] = []
    for sequences, keys in sizes.decodes:
        plan.append((f"decode {sequences} x {keys}", lambda s=sequences, k=keys: attention(sizes, s, k, 1)))
    plan.append((f"chunk {sizes.chunk}", lambda: attention(sizes, 1, sizes.chunk[1], sizes.chunk[0])))
    for tokens in sizes.tokens:
        plan.append((f"{tokens} tokens", lambda t=tokens: small(sizes, t)))
    for tokens in sizes.tokens[:2]:
        plan.append((f"{tokens} rows", lambda t=tokens: draws(sizes, t)))
    for case, make in plan:
        works, num_bytes = make()
        cells, failed = medians(works, args.rounds)
        for name, cell in cells.items():
            speed = num_bytes[name] / cell["us"] / 1e3
            row = {"case": case, "name": name, **cell, "bytes": num_bytes[name], "gb_s": speed}
            row["of_copy_bandwidth"] = speed / report["copy_gb_s"]
            report["rows"].append(row)
            print(
                f"{case:20} {name:24} {cell['us']:9.1f} us {speed:7.0f} GB/s {row['of_copy_bandwidth']:5.0%}",
                flush=True,
            )
        report["rows"] += [{"case": case, "name": name, "failed": why} for name, why in failed.items()]
        for name, why in failed.items():
            print(f"{case:20} {name:24} {why}")
        save(report, args.out, "kernels")
    write(report, args.out, "kernels")


if __name__ == "__main__":
    main()
