"""Inputs for the operations, and the comparison with float64: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

import itertools
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What one rounding to the type may cost, relative to the largest number of the result.
ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-12}
_COUNT = itertools.count(int.from_bytes(os.urandom(4)))


def fresh() -> torch.Generator:
    """New numbers in every run; the seed is in the message of a failure."""
    generator = torch.Generator()
    generator.manual_seed(next(_COUNT))
    return generator


def normal(*shape: int, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None) -> torch.Tensor:
    return torch.randn(shape, generator=generator or fresh()).to(DEVICE, dtype)


def assert_close(actual: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: object = "") -> None:
    """No difference above `tolerance` times the largest wanted number."""
    assert actual.shape == wanted.shape, what
    if wanted.numel() == 0:
        return
    wanted = wanted.double()
    assert torch.isfinite(actual.double()).all(), f"not finite: {what}"
    error = (actual.double() - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
    assert error <= tolerance, f"error {error} over {tolerance}: {what}"


class Paged:
    """A paged cache with sequences in it. lengths: (queries, keys) of each."""

    def __init__(
        self,
        lengths: list[tuple[int, int]],
        heads: tuple[int, int],
        width: int,
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        cache: torch.dtype | None = None,
        spare: int = 2,
    ) -> None:
        generator = fresh()
        counts = [-(-keys // block_size) for _, keys in lengths]
        total = sum(counts) + spare
        order = torch.randperm(total, generator=generator).int()
        self.q = normal(sum(q for q, _ in lengths), heads[0], width, dtype=dtype, generator=generator)
        self.k, self.v = (normal(total * block_size, heads[1], width, generator=generator) for _ in "kv")
        self.caches = [torch.zeros(total, block_size, heads[1], width, device=DEVICE).to(cache or dtype) for _ in "kv"]
        quantised = (cache or dtype) in (torch.int8, torch.float8_e4m3fn)
        self.scales = [torch.zeros(total, block_size, heads[1], device=DEVICE) if quantised else None for _ in "kv"]
        self.block_tables = torch.full((len(lengths), max([*counts, 1]) + 1), -1, dtype=torch.int32)
        used = 0
        for row, count in enumerate(counts):
            self.block_tables[row, :count] = order[used : used + count]
            used += count
        self.block_tables = self.block_tables.to(DEVICE)
        bounds = torch.tensor([0, *itertools.accumulate(q for q, _ in lengths)], dtype=torch.int32)
        self.cu_seqlens_q = bounds.to(DEVICE)
        self.kv_lens = torch.tensor([keys for _, keys in lengths], dtype=torch.int32, device=DEVICE)
        self.max_q_len = max(q for q, _ in lengths)

    def arrays(self) -> tuple[torch.Tensor, ...]:
        return (self.q, *self.caches, self.block_tables, self.cu_seqlens_q, self.kv_lens)

    def doubles(self) -> tuple[torch.Tensor, ...]:
        """The same with floats in float64; caches of codes stay."""
        caches = (
            cache if scale is not None else cache.double()
            for cache, scale in zip(self.caches, self.scales, strict=True)
        )
        return (self.q.double(), *caches, self.block_tables, self.cu_seqlens_q, self.kv_lens)
