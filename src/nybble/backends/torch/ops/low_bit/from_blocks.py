"""The blocks of a GGUF file as codes in planes: the same bits, moved so that a GPU loads them in wide pieces."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from nybble.backends.torch.ops.low_bit.coded import CodedLinear, Codes
from nybble.backends.torch.ops.low_bit.planes import Layout
from nybble.checkpoint import Tensor
from nybble.quant.reference import E2M1_DOUBLED, IQ4_VALUES

Bytes = npt.NDArray[np.uint8]
BLOCK_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4")


def from_blocks(tensor: Tensor, device: torch.device | str) -> CodedLinear:
    """tensor: a matrix of one of BLOCK_TYPES."""
    rows, columns = tensor.shape
    blocks = np.frombuffer(tensor.data, np.uint8).reshape(rows, -1, tensor.format.block_bytes)
    codes = _READERS[tensor.format.name](blocks, torch.device(device))
    return CodedLinear(tensor.format.name, codes, columns)


def _q4_0(b: Bytes, device: torch.device) -> Codes:
    low, _ = _planes(Layout(4, 32), _nibbles(b[:, :, 2:]), device)
    return Codes("int", Layout(4, 32), 32, low, None, _halves(b[:, :, :2], device), middle=8)


def _q4_1(b: Bytes, device: torch.device) -> Codes:
    return _affine(Layout(4, 32), _nibbles(b[:, :, 4:]), b, device)


def _q5_1(b: Bytes, device: torch.device) -> Codes:
    return _affine(Layout(5, 32), _nibbles(b[:, :, 8:]) | _fifth(b[:, :, 4:8]), b, device)


def _affine(layout: Layout, codes: Bytes, b: Bytes, device: torch.device) -> Codes:
    low, high = _planes(layout, codes, device)
    return Codes("affine", layout, 32, low, high, _halves(b[:, :, :2], device), minimum=_halves(b[:, :, 2:4], device))


def _q5_0(b: Bytes, device: torch.device) -> Codes:
    low, high = _planes(Layout(5, 32), _nibbles(b[:, :, 6:]) | _fifth(b[:, :, 2:6]), device)
    return Codes("int", Layout(5, 32), 32, low, high, _halves(b[:, :, :2], device), middle=16)


def _iq4_nl(b: Bytes, device: torch.device) -> Codes:
    low, _ = _planes(Layout(4, 32), _nibbles(b[:, :, 2:]), device)
    table = torch.from_numpy(IQ4_VALUES.copy()).to(device)
    return Codes("table", Layout(4, 32), 32, low, None, _halves(b[:, :, :2], device), table=table, table16=table.half())


def _mxfp4(b: Bytes, device: torch.device) -> Codes:
    low, _ = _planes(Layout(4, 32), _nibbles(b[:, :, 1:]), device)
    scale = np.ldexp(np.float32(1), b[:, :, 0].astype(np.int32) - 128).astype(np.float32)  # of twice the value
    table = torch.from_numpy(E2M1_DOUBLED.copy()).to(device)
    packed = torch.from_numpy(np.ascontiguousarray(scale.T)).to(device)
    return Codes("table", Layout(4, 32), 32, low, None, packed, table=table, table16=table.half())


def _q8_0(b: Bytes, device: torch.device) -> Codes:
    low, _ = _planes(Layout(8, 32), b[:, :, 2:] ^ np.uint8(128), device)
    return Codes("int", Layout(8, 32), 32, low, None, _halves(b[:, :, :2], device), middle=128)


def _q4_k(b: Bytes, device: torch.device) -> Codes:
    return _two_level(b, _fields(b[:, :, 16:], 4), Layout(4, 32), device)


def _q5_k(b: Bytes, device: torch.device) -> Codes:
    codes = _fields(b[:, :, 48:], 4) | (_fields(b[:, :, 16:48], 1) << np.uint8(4))
    return _two_level(b, codes, Layout(5, 32), device)


def _two_level(b: Bytes, codes: Bytes, layout: Layout, device: torch.device) -> Codes:
    low, high = _planes(layout, codes, device)
    return Codes(
        "k", layout, 32, low, high, _halves(b[:, :, :2], device), minimum=_halves(b[:, :, 2:4], device),
        packed=_rows_last(b[:, :, 4:16], device),
    )  # fmt: skip


def _q6_k(b: Bytes, device: torch.device) -> Codes:
    halves = b[:, :, :128].reshape(*b.shape[:2], 2, 64)
    nibbles = np.concatenate([halves & 15, halves >> 4], axis=3).reshape(*b.shape[:2], 256)
    codes = nibbles | (_fields(b[:, :, 128:192], 2) << np.uint8(4))
    layout = Layout(6, 32)
    low, high = _planes(layout, codes, device)
    scales = _rows_last(b[:, :, 192:208], device).view(torch.int8).flatten(0, 1)
    return Codes("q6", layout, 16, low, high, _halves(b[:, :, 208:210], device), packed=scales)


def _fifth(word: Bytes) -> Bytes:
    """[rows, blocks, 4] -> [rows, blocks, 32]: bit j of the 32-bit word, as 0 or 16."""
    return np.unpackbits(word, axis=2, bitorder="little") << np.uint8(4)


def _nibbles(packed: Bytes) -> Bytes:
    """[rows, blocks, 16] -> [rows, blocks, 32]: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=2)


def _fields(packed: Bytes, bits: int) -> Bytes:
    """[rows, blocks, 32 h] -> [rows, blocks, h * 8 / bits * 32]: of 32 bytes, field 0 of all, then field 1, ..."""
    runs = packed.reshape(*packed.shape[:2], -1, 1, 32)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
    return ((runs >> shifts) & np.uint8((1 << bits) - 1)).reshape(*packed.shape[:2], -1)


def _planes(layout: Layout, codes: Bytes, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return layout.pack(torch.from_numpy(np.ascontiguousarray(codes.reshape(len(codes), -1))).to(device))


def _rows_last(part: Bytes, device: torch.device) -> torch.Tensor:
    """[rows, blocks, n] -> [blocks, n, rows]."""
    return torch.from_numpy(np.ascontiguousarray(part.transpose(1, 2, 0))).to(device)


def _halves(part: Bytes, device: torch.device) -> torch.Tensor:
    """Two bytes of each block -> float16 [blocks, rows]."""
    values = np.ascontiguousarray(part).view(np.float16)[:, :, 0]
    return torch.from_numpy(np.ascontiguousarray(values.T)).to(device)


_READERS = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k,
    "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "MXFP4": _mxfp4,
}  # fmt: skip
