"""Matrices of random codes on the device, at any shape, without quantising anything."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nybble.backends.torch.ops.low_bit.coded import Codes, Meaning
from nybble.backends.torch.ops.low_bit.planes import Layout

Device = torch.device | str


def matrix(
    meaning: Meaning, bits: int, run: int, group: int, n: int, k: int, *, device: Device = "cpu"
) -> Codes:  # fmt: skip
    """[n, k]; k a multiple of 256 and of the group."""
    layout = Layout(bits, run)

    def bytes_of(*shape: int, most: int = 256) -> torch.Tensor:
        return torch.randint(0, most, shape, dtype=torch.uint8, device=device)

    def scales(count: int) -> torch.Tensor:
        return (torch.rand(count, n, device=device) * 0.01).to(torch.float16)

    most = 127 if meaning == "e4m3" else 256  # no NaN
    low = bytes_of(n, k * layout.low_bits // 8, most=most)
    high = bytes_of(n, k * layout.high_bits // 8) if layout.high_bits else None
    if meaning == "k":
        packed = bytes_of(k // 256, 12, n)
        return Codes(meaning, layout, group, low, high, scales(k // 256), minimum=scales(k // 256), packed=packed)
    if meaning == "k2":
        packed = bytes_of(k // 16, n)
        return Codes(meaning, layout, group, low, high, scales(k // 256), minimum=scales(k // 256), packed=packed)
    table = torch.linspace(-1, 1, 16, device=device)
    if meaning in ("k16", "ktable"):
        small, tables = bytes_of(k // group, n).view(torch.int8), (table, table.half()) if meaning == "ktable" else ()
        middle = 1 << (bits - 1)
        return Codes(meaning, layout, group, low, high, scales(k // 256), None, middle, None, small, *tables)
    groups = max(k // group, 1)
    if meaning == "affine":
        return Codes(meaning, layout, group, low, high, scales(groups), minimum=scales(groups))
    zero = bytes_of(groups, n, most=1 << bits) if meaning == "int" and bits < 8 else None
    return Codes(
        meaning,
        layout,
        group,
        low,
        high,
        scales(groups),
        zero,
        middle=1 << (bits - 1),
        table=table,
        table16=table.half(),
    )


# By the names of the tables.
MATRICES: dict[str, Callable[[int, int, Device], Codes]] = {
    "W4A16 g128": lambda n, k, device: matrix("int", 4, 128, 128, n, k, device=device),
    "W2A16 g64": lambda n, k, device: matrix("int", 2, 64, 64, n, k, device=device),
    "W3A16 g128": lambda n, k, device: matrix("int", 3, 32, 128, n, k, device=device),
    "W8A16 g128": lambda n, k, device: matrix("int", 8, 128, 128, n, k, device=device),
    "Q4_0": lambda n, k, device: matrix("int", 4, 32, 32, n, k, device=device),
    "Q4_1": lambda n, k, device: matrix("affine", 4, 32, 32, n, k, device=device),
    "Q8_0": lambda n, k, device: matrix("int", 8, 32, 32, n, k, device=device),
    "Q4_K": lambda n, k, device: matrix("k", 4, 32, 32, n, k, device=device),
    "Q5_K": lambda n, k, device: matrix("k", 5, 32, 32, n, k, device=device),
    "Q2_K": lambda n, k, device: matrix("k2", 2, 16, 16, n, k, device=device),
    "Q3_K": lambda n, k, device: matrix("k16", 3, 32, 16, n, k, device=device),
    "Q6_K": lambda n, k, device: matrix("k16", 6, 32, 16, n, k, device=device),
    "IQ4_XS": lambda n, k, device: matrix("ktable", 4, 32, 32, n, k, device=device),
    "NF4": lambda n, k, device: matrix("table", 4, 64, 64, n, k, device=device),
    "FP8": lambda n, k, device: matrix("e4m3", 8, 128, k, n, k, device=device),
}
