#!/usr/bin/env python3
"""FlashAttention beside torch's own attention and the naive formula: time, operations, memory, counted bytes.

Every round runs each of them once, in turn, on the same tensors; a cell is the median over the rounds. The bytes are
counted from the shapes and the tiles (see docs/flash-attention.md), not measured.

    python bench/gpu/flash_attention.py [--tokens 16384] [--rounds 7] [--sweep] [--out docs/benchmarks/gpu]

--sweep: time other tiles, too, forward and backward. On a machine without a GPU (with TRITON_INTERPRET=1) it only shows
that it runs: --dry.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import DEVICE, ON_GPU, facts, medians, write
from torch.nn.attention import SDPBackend, sdpa_kernel

from nybble.backends.torch.flash import attention as ours_module
from nybble.backends.torch.flash import flash_attention
from nybble.backends.torch.flash.tiles import Tiles

HEADS, WIDTH = 16, 128
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FORWARD_TILES = (
    Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2), Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 4), Tiles(64, 128, 4, 2),
    Tiles(64, 64, 4, 3),
)  # fmt: skip
BACKWARD_TILES = (
    Tiles(64, 64, 8, 2),
    Tiles(64, 64, 4, 2),
    Tiles(128, 64, 8, 2),
    Tiles(64, 32, 4, 2),
    Tiles(32, 64, 4, 2),
)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    s = q @ k.transpose(-1, -2) * WIDTH**-0.5
    hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
    return torch.softmax(s.masked_fill(hidden, float("-inf")), dim=-1) @ v


def torchs(backend: SDPBackend) -> Attention:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return flash_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def candidates() -> dict[str, Attention]:
    if not ON_GPU:
        return {"nybble": ours, "torch math": torchs(SDPBackend.MATH), "naive": naive}
    return {
        "nybble": ours,
        "torch flash": torchs(SDPBackend.FLASH_ATTENTION),
        "torch cudnn": torchs(SDPBackend.CUDNN_ATTENTION),
        "naive": naive,
    }


def extra_bytes(work: Callable[[], object]) -> int:
    """Memory that came on top while it ran."""
    if not ON_GPU:
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = work()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def counted_bytes(tokens: int, tile: int, item: int) -> dict[str, int]:
    """Of all heads, causal: across the bus between the cores and the second-level cache, and from memory at least."""
    rows = tokens * WIDTH * item
    tiled = rows + tokens // tile * rows + rows + 4 * tokens
    written_out = 3 * rows + 2 * tokens * tokens * item + rows + 2 * tokens * tokens * item
    return {
        "naive": HEADS * written_out,
        "tiled": HEADS * tiled,
        "tiled_from_memory": HEADS * (4 * rows + 4 * tokens),
    }


def forward_ops(tokens: int) -> float:
    """Half of the products of a causal mask: 2 matrix products forward, 5 backward."""
    return 2 * 2 * HEADS * tokens * tokens * WIDTH / 2


class Measured:
    """One set of inputs, and the table of what ran on them."""

    def __init__(self, tokens: int, rounds: int) -> None:
        self.tokens, self.rounds = tokens, rounds
        dtype = torch.bfloat16 if ON_GPU else torch.float32
        shape = (1, HEADS, tokens, WIDTH)
        self.inputs = [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3)]
        self.d_out = torch.randn(shape, device=DEVICE, dtype=dtype)

    def forward(self, function: Attention) -> torch.Tensor:
        return function(*self.inputs)

    def backward_of(self, function: Attention) -> Callable[[], object]:
        """With the forward pass run before, its graph kept."""
        out = self.forward(function)
        return lambda: torch.autograd.grad(out, self.inputs, self.d_out, retain_graph=True)

    def table(self, functions: dict[str, Attention]) -> dict[str, Any]:
        cells: dict[str, Any] = {}
        for direction, factor in (("forward", 1.0), ("backward", 2.5)):
            works, memory, failed = {}, {}, {}
            for name, function in functions.items():
                try:
                    make = self.backward_of(function) if direction == "backward" else self._forward_of(function)
                    memory[name] = extra_bytes(make)
                except RuntimeError as error:  # out of memory, or no such kernel here
                    failed[name] = str(error).splitlines()[0][:200]
                    continue
                works[name] = make
            measured, later = medians(works, self.rounds)
            for name, cell in measured.items():
                ops = forward_ops(self.tokens) * factor
                cells[f"{name} {direction}"] = {
                    **cell, "tflops": ops / cell["us"] / 1e6, "extra_mb": memory[name] / 1e6
                }  # fmt: skip
            cells |= {f"{name} {direction}": {"failed": why} for name, why in (failed | later).items()}
            works.clear()
        return cells

    def _forward_of(self, function: Attention) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return self.forward(function)

        return run


@contextmanager
def tiles(forward: Tiles | None = None, backward: Tiles | None = None) -> Iterator[None]:
    """Other tiles than the usual ones, for a while."""
    usual = ours_module.forward_tiles, ours_module.backward_tiles
    if forward is not None:
        ours_module.forward_tiles = lambda _: forward
    if backward is not None:
        ours_module.backward_tiles = lambda _: backward
    try:
        yield
    finally:
        ours_module.forward_tiles, ours_module.backward_tiles = usual


def sweep(measured: Measured) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tile in FORWARD_TILES:
        with tiles(forward=tile):
            cells, failed = medians({"us": measured._forward_of(ours)}, measured.rounds)
        found[f"forward {tile}"] = cells.get("us", failed)
    for tile in BACKWARD_TILES:
        with tiles(backward=tile):
            cells, failed = medians({"us": measured.backward_of(ours)}, measured.rounds)
        found[f"backward {tile}"] = cells.get("us", failed)
    return found


def ratios(cells: dict[str, Any], ceilings: dict[str, Any]) -> dict[str, float]:
    """Ours against the better of torch's, against naive, and against the measured matrix product."""
    out = {}
    for direction in ("forward", "backward"):
        speed = {
            name.removesuffix(f" {direction}"): cell.get("tflops") for name, cell in cells.items() if direction in name
        }
        best = max((value or 0 for name, value in speed.items() if name.startswith("torch")), default=0)
        if speed.get("nybble") and best:
            out[f"{direction} over torch's best"] = speed["nybble"] / best
        if speed.get("nybble") and speed.get("naive"):
            out[f"{direction} over naive"] = speed["nybble"] / speed["naive"]
        if speed.get("nybble"):
            out[f"{direction} of the matrix product's rate"] = speed["nybble"] / ceilings["matrix_bf16_tflops"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sweep", action="store_true", help="time other tiles at the longest of --tokens")
    parser.add_argument("--dry", action="store_true", help="64 tokens")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    report: dict[str, Any] = facts() | {"benchmark": "gpu-flash", "heads": HEADS, "width": WIDTH, "tables": []}
    for tokens in [64] if args.dry else args.tokens:
        measured = Measured(tokens, args.rounds)
        cells = measured.table(candidates())
        tile = ours_module.forward_tiles(measured.inputs[0].transpose(1, 2).flatten(0, 1)).queries
        counted = counted_bytes(tokens, tile, measured.d_out.element_size())
        table = {"tokens": tokens, "cells": cells, "ratios": ratios(cells, report), "counted_bytes": counted}
        if args.sweep and tokens == max(args.tokens):
            table["tiles"] = sweep(measured)
        report["tables"].append(table)
        for name, cell in cells.items():
            said = (
                cell.get("failed")
                or f"{cell['us'] / 1e3:9.3f} ms {cell['tflops']:6.1f} Tflop/s {cell['extra_mb']:8.0f} MB"
            )
            print(f"{tokens:6} {name:22} {said}", flush=True)
        print(table["ratios"], counted, table.get("tiles", ""))
    write(report, args.out, "flash-attention")


if __name__ == "__main__":
    main()
