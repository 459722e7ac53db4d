"""The blocks of a GGUF file as codes in planes: the same bits, moved so that a GPU loads them in wide pieces.

The bytes go to the device as they are and are taken apart there, so that loading does not wait for the CPU.
"""

from __future__ import annotations

import numpy as np
import torch

from nybble.backends.torch.ops.low_bit.coded import CodedLinear, Codes
from nybble.backends.torch.ops.low_bit.planes import Layout
from nybble.checkpoint import Tensor
from nybble.quant.reference import E2M1_DOUBLED, IQ4_VALUES


def from_blocks(tensor: Tensor, device: torch.device | str) -> CodedLinear:
    """tensor: a matrix of one of BLOCK_TYPES."""
    rows, columns = tensor.shape
    stored = torch.from_numpy(np.frombuffer(tensor.data, np.uint8).copy())
    blocks = stored.to(device).view(rows, -1, tensor.format.block_bytes)
    return CodedLinear(tensor.format.name, _READERS[tensor.format.name](blocks), columns)


def _q4_0(b: torch.Tensor) -> Codes:
    low, _ = _planes(Layout(4, 32), _nibbles(b[:, :, 2:]))
    return Codes("int", Layout(4, 32), 32, low, None, _halves(b[:, :, :2]), middle=8)


def _q4_1(b: torch.Tensor) -> Codes:
    return _affine(Layout(4, 32), _nibbles(b[:, :, 4:]), b)


def _q5_1(b: torch.Tensor) -> Codes:
    return _affine(Layout(5, 32), _nibbles(b[:, :, 8:]) | _fifth(b[:, :, 4:8]), b)


def _affine(layout: Layout, codes: torch.Tensor, b: torch.Tensor) -> Codes:
    low, high = _planes(layout, codes)
    return Codes("affine", layout, 32, low, high, _halves(b[:, :, :2]), minimum=_halves(b[:, :, 2:4]))


def _q5_0(b: torch.Tensor) -> Codes:
    low, high = _planes(Layout(5, 32), _nibbles(b[:, :, 6:]) | _fifth(b[:, :, 2:6]))
    return Codes("int", Layout(5, 32), 32, low, high, _halves(b[:, :, :2]), middle=16)


def _q8_0(b: torch.Tensor) -> Codes:
    low, _ = _planes(Layout(8, 32), b[:, :, 2:] ^ 128)
    return Codes("int", Layout(8, 32), 32, low, None, _halves(b[:, :, :2]), middle=128)


def _iq4_nl(b: torch.Tensor) -> Codes:
    low, _ = _planes(Layout(4, 32), _nibbles(b[:, :, 2:]))
    table = _iq4_table(b.device)
    return Codes("table", Layout(4, 32), 32, low, None, _halves(b[:, :, :2]), table=table, table16=table.half())


def _iq4_table(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(IQ4_VALUES.copy()).to(device)


def _mxfp4(b: torch.Tensor) -> Codes:
    low, _ = _planes(Layout(4, 32), _nibbles(b[:, :, 1:]))
    exponent = b[:, :, 0].int()
    # 2^(exponent - 128), half of the scale, for a table of doubled values; the two smallest have no exponent bits.
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    table = torch.from_numpy(E2M1_DOUBLED.copy()).to(b.device)
    scale = bits.view(torch.float32).t().contiguous()
    return Codes("table", Layout(4, 32), 32, low, None, scale, table=table, table16=table.half())


def _q4_k(b: torch.Tensor) -> Codes:
    return _two_level(b, _fields(b[:, :, 16:], 4), Layout(4, 32))


def _q5_k(b: torch.Tensor) -> Codes:
    return _two_level(b, _fields(b[:, :, 48:], 4) | (_fields(b[:, :, 16:48], 1) << 4), Layout(5, 32))


def _two_level(b: torch.Tensor, codes: torch.Tensor, layout: Layout) -> Codes:
    low, high = _planes(layout, codes)
    packed = _rows_last(b[:, :, 4:16])
    return Codes(
        "k", layout, 32, low, high, _halves(b[:, :, :2]), minimum=_halves(b[:, :, 2:4]), packed=packed
    )  # fmt: skip


def _q2_k(b: torch.Tensor) -> Codes:
    low, _ = _planes(Layout(2, 16), _fields(b[:, :, 16:80], 2))
    packed = _rows_last(b[:, :, :16]).flatten(0, 1)
    d, dmin = _halves(b[:, :, 80:82]), _halves(b[:, :, 82:84])
    return Codes("k2", Layout(2, 16), 16, low, None, d, minimum=dmin, packed=packed)


def _q3_k(b: torch.Tensor) -> Codes:
    low, high = _planes(Layout(3, 32), _fields(b[:, :, 32:96], 2) | (_fields(b[:, :, :32], 1) << 2))
    # Of 16 scales the low halves lie in eight bytes, the upper two bits in four more: those of scale i at 2 (i / 4).
    upper = torch.cat([b[:, :, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)
    packed = _signed(_nibbles(b[:, :, 96:104]) | upper << 4)
    return Codes("k16", Layout(3, 32), 16, low, high, _halves(b[:, :, 108:110]), middle=4, packed=packed)


def _iq4_xs(b: torch.Tensor) -> Codes:
    low, _ = _planes(Layout(4, 32), _nibbles(b[:, :, 8:].reshape(len(b), -1, 16)))
    lower = torch.stack([b[:, :, 4:8] & 15, b[:, :, 4:8] >> 4], dim=3).flatten(2)
    upper = torch.stack([b[:, :, 2:4] >> shift & 3 for shift in (0, 2, 4, 6)], dim=3).flatten(2)
    table = _iq4_table(b.device)
    return Codes(
        "ktable", Layout(4, 32), 32, low, None, _halves(b[:, :, :2]), packed=_signed(lower | upper << 4), table=table,
        table16=table.half(),
    )  # fmt: skip


def _signed(scales: torch.Tensor) -> torch.Tensor:
    """Six-bit scales [rows, blocks, n], which stand for themselves less 32 -> int8 [blocks * n, rows]."""
    return (_rows_last(scales).to(torch.int8) - 32).flatten(0, 1)


def _q6_k(b: torch.Tensor) -> Codes:
    halves = b[:, :, :128].reshape(*b.shape[:2], 2, 64)
    nibbles = torch.cat([halves & 15, halves >> 4], dim=3).reshape(*b.shape[:2], 256)
    low, high = _planes(Layout(6, 32), nibbles | (_fields(b[:, :, 128:192], 2) << 4))
    scales = _rows_last(b[:, :, 192:208]).view(torch.int8).flatten(0, 1)
    return Codes("k16", Layout(6, 32), 16, low, high, _halves(b[:, :, 208:210]), middle=32, packed=scales)


def _fifth(word: torch.Tensor) -> torch.Tensor:
    """[rows, blocks, 4] -> [rows, blocks, 32]: bit j of the 32-bit word, as 0 or 16."""
    bits = torch.arange(8, dtype=torch.uint8, device=word.device)
    return (((word[:, :, :, None] >> bits) & 1) << 4).flatten(2)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[rows, blocks, n] -> [rows, blocks, 2 n]: all low nibbles, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], dim=2)


def _fields(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, blocks, 32 h] -> [rows, blocks, h * 8 / bits * 32]: of 32 bytes, field 0 of all, then field 1, ..."""
    runs = packed.reshape(*packed.shape[:2], -1, 1, 32)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(-1, 1)
    return ((runs >> shifts) & ((1 << bits) - 1)).reshape(*packed.shape[:2], -1)


def _planes(layout: Layout, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    return layout.pack(codes.reshape(len(codes), -1))


def _rows_last(part: torch.Tensor) -> torch.Tensor:
    """[rows, blocks, n] -> [blocks, n, rows]."""
    return part.permute(1, 2, 0).contiguous()


def _halves(part: torch.Tensor) -> torch.Tensor:
    """Two bytes of each block -> float16 [blocks, rows]."""
    return part.contiguous().view(torch.float16)[:, :, 0].t().contiguous()


_READERS = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip
BLOCK_TYPES = frozenset(_READERS)
