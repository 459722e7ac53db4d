"""4-bit codebooks with double quantisation, and 8 bits per row, as bitsandbytes 0.50.2 computes them on a CPU.

NF4 and double quantisation: Dettmers et al. 2023, arXiv 2305.14314. The 8-bit dynamic code: arXiv 2110.02861. LLM.int8:
arXiv 2208.07339. All arithmetic is float32 and in the order that gives bitsandbytes' bits.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from nybble.formats.dialects.bnb import NestedAbsmax
from nybble.quant.weights import CODEBOOKS, Codebook4, RowInt8

NESTED_BLOCK = 256
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_TINY = 1e-38
_LOOKUP = 65535  # steps from -1 to 1


def quantize_4bit(weight: torch.Tensor, table: Literal["nf4", "fp4"], block: int = 64) -> Codebook4:
    """weight: float32 [out, in]. Blocks are neighbours in the matrix read row by row; the last may be shorter."""
    flat = weight.reshape(-1)
    rest = flat.numel() % block
    full = flat[: flat.numel() - rest].reshape(-1, block)
    absmax = full.abs().amax(dim=1)
    scaled = (full * (1.0 / absmax.clamp(min=_TINY))[:, None]).clamp_(-1, 1).reshape(-1)
    if rest:
        last = flat[-rest:]
        most = last.abs().amax().clamp(min=_TINY)
        absmax = torch.cat((absmax, most[None]))
        scaled = torch.cat((scaled, (last / most).clamp_(-1, 1)))
    bounds, order = _bounds(table)
    codes = order[torch.bucketize(scaled, bounds)]
    return Codebook4(table, codes.reshape(weight.shape).numpy(), absmax.numpy(), block)


@cache
def _bounds(table: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Where one value ends and the next begins, and the codes in the order of their values."""
    values = torch.from_numpy(CODEBOOKS[table])
    ascending, order = values.sort(stable=True)
    return (ascending[1:] + ascending[:-1]) / 2, order.to(torch.uint8)


def nest_absmax(absmax: npt.NDArray[np.float32]) -> NestedAbsmax:
    """Double quantisation: what is above or below the mean, in 8 bits of the dynamic code per block of 256."""
    values = torch.from_numpy(absmax)
    offset = values.mean()
    centred = values - offset
    pad = -centred.numel() % NESTED_BLOCK
    blocks = torch.nn.functional.pad(centred, (0, pad)).reshape(-1, NESTED_BLOCK)
    scales = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / scales.clamp(min=_TINY))[:, None]
    steps = ((scaled + 1.0) * 0.5 * _LOOKUP + 0.5).to(torch.long).clamp_(0, _LOOKUP)
    codes = _dynamic_lookup()[steps].reshape(-1)[: centred.numel()]
    return NestedAbsmax(codes.numpy(), scales.numpy(), dynamic_code(), np.float32(offset.item()))


@cache
def _dynamic_lookup() -> torch.Tensor:
    """The nearest code of -1 ... 1 in 65536 even steps, which is as finely as bitsandbytes looks."""
    code = torch.from_numpy(dynamic_code())
    values = torch.arange(_LOOKUP + 1) / _LOOKUP * 2.0 - 1.0
    return torch.bucketize(values, (code[1:] + code[:-1]) / 2).to(torch.uint8)


@cache
def dynamic_code() -> npt.NDArray[np.float32]:
    """256 ascending values: decades down to 1e-7, each cut as finely as the bits that its place leaves allow."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        centres = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1.0, -1.0):
            values += (sign * 10.0 ** (i - 6) * centres).tolist()
    return np.array(sorted(values), np.float32)


def quantize_rows(weight: torch.Tensor, threshold: float) -> RowInt8:
    """LLM.int8: weight float32 [out, in], each row to 8 bits of its largest absolute value.

    bitsandbytes rounds weights to float16 first, whatever they were.
    """
    half = weight.to(torch.float16)
    absmax = half.abs().amax(dim=1).float()
    codes = torch.round(half * (127.0 / absmax[:, None])).to(torch.int8)
    return RowInt8(codes.numpy(), absmax.numpy(), threshold)
