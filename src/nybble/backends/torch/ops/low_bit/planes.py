"""Codes of 2 to 8 bits as planes of bytes: a byte holds the codes of weights that lie far apart, not of neighbours.

A row is cut into runs of `run` weights, and a chunk of runs shares its bytes: byte j of a chunk holds, from its lowest
bits up, code j of the first run, code j of the second, and so on. One load of neighbouring bytes so gives several tiles
of neighbouring weights by shifts alone, and nothing has to be shuffled between threads.

    4 bits, run 32:  byte j of 32 = code j | code 32 + j << 4
    6 bits, run 32:  two such tiles of low bits, and 32 bytes with the upper two bits of all four runs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# bits of a code -> bits in the low plane and in the high one
PLANES = {2: (2, 0), 3: (2, 1), 4: (4, 0), 5: (4, 1), 6: (4, 2), 8: (8, 0)}


@dataclass(frozen=True, slots=True)
class Layout:
    """How codes of `bits` bits lie in planes. run: weights that lie next to each other, at least 16."""

    bits: int
    run: int

    @property
    def low_bits(self) -> int:
        return PLANES[self.bits][0]

    @property
    def high_bits(self) -> int:
        return PLANES[self.bits][1]

    @property
    def runs(self) -> int:
        """Runs in a chunk."""
        return 8 // (self.high_bits or self.low_bits)

    @property
    def lows(self) -> int:
        """Tiles of low bits in a chunk."""
        return self.runs * self.low_bits // 8

    @property
    def chunk(self) -> int:
        """Weights in a chunk."""
        return self.runs * self.run

    def pack(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """uint8 [out, in] -> the low plane [out, chunks * lows * run] and the high one [out, chunks * run], if any.

        Inputs are filled up to whole chunks with zeros.
        """
        padded = F.pad(codes, (0, -codes.shape[1] % self.chunk))
        parts = padded.view(len(codes), -1, self.runs, self.run)
        low = _packed(parts & ((1 << self.low_bits) - 1), self.low_bits)
        high = _packed(parts >> self.low_bits, self.high_bits) if self.high_bits else None
        return low, high

    def unpack(self, low: torch.Tensor, high: torch.Tensor | None, in_features: int) -> torch.Tensor:
        """The codes again, uint8 [out, in_features]."""
        codes = _unpacked(low, self.low_bits, self.run)
        if high is not None:
            codes = codes | (_unpacked(high, self.high_bits, self.run) << self.low_bits)
        return codes.flatten(1)[:, :in_features]


def _packed(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """[out, chunks, runs, run] fields of `bits` bits -> bytes [out, ...]."""
    each = 8 // bits
    fields = parts.reshape(len(parts), -1, each, parts.shape[-1])
    out = fields[:, :, 0].clone()
    for index in range(1, each):
        out |= fields[:, :, index] << (bits * index)
    return out.flatten(1).contiguous()


def _unpacked(plane: torch.Tensor, bits: int, run: int) -> torch.Tensor:
    """[out, bytes] -> [out, runs, run] fields."""
    each = 8 // bits
    tiles = plane.view(len(plane), -1, 1, run)
    shifts = torch.arange(0, 8, bits, device=plane.device, dtype=torch.uint8).view(1, 1, each, 1)
    return ((tiles >> shifts) & ((1 << bits) - 1)).flatten(1, 2)
