"""The grids of GGUF types with learned scales: Q4_K, Q2_K, what mixes put beside them and what they fall back to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from nybble import _native
from nybble.compress.qat.pack import LAYOUTS, Blocks, Bytes, pack, unpack_scales
from nybble.compress.qat.rounding import codes_of, round_groups, stored_as, whole_numbers
from nybble.core.errors import CheckpointError
from nybble.quant.formats import QuantFormat


class BlockGrid(nn.Module):
    """Makes of a linear's weight the values that its blocks in the file decode to.

    The encoder's scales and minima are where it starts. The scale of scales of a block (float16) and the small whole
    numbers beside it are learned as factors on that; the forward pass has them as the file can keep them. A block of
    weights that the encoder gave the scale 0 keeps it.
    """

    d: torch.Tensor
    scales: torch.Tensor
    dmin: torch.Tensor | None
    minima: torch.Tensor | None
    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, blocks: Bytes, fmt: QuantFormat, shape: tuple[int, int]) -> None:
        """blocks: of a matrix of this shape as the encoder makes them."""
        super().__init__()
        self.format = fmt
        self.layout = LAYOUTS[fmt.name]
        found = unpack_scales(fmt, blocks.reshape(-1, fmt.block_bytes))
        wide = (shape[0], shape[1] // fmt.block_size, -1)
        self.register_buffer("d", torch.from_numpy(found.d).reshape(wide))
        self.register_buffer("scales", torch.from_numpy(found.scales.astype(np.float32)).reshape(wide))
        self.block_scale = nn.Parameter(torch.zeros_like(self.d))  # logarithms of factors, all four
        two_levels = self.layout.scale_range is not None
        self.part_scale = nn.Parameter(torch.zeros_like(self.scales)) if two_levels else None
        has_minima = found.dmin is not None and found.minima is not None
        dmin = torch.from_numpy(found.dmin).reshape(wide) if found.dmin is not None else None
        minima = torch.from_numpy(found.minima.astype(np.float32)).reshape(wide) if found.minima is not None else None
        self.register_buffer("dmin", dmin)
        self.register_buffer("minima", minima)
        self.block_minimum = nn.Parameter(torch.zeros_like(self.d)) if has_minima else None
        self.part_minimum = nn.Parameter(torch.zeros_like(self.scales)) if has_minima and two_levels else None
        self.register_buffer("low", torch.tensor([float(self.layout.low)]))
        self.register_buffer("high", torch.tensor([float(self.layout.high)]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, in] -> the same on the grid."""
        scale, offset = self._steps()
        groups = weight.reshape(len(weight), -1, self.layout.part)
        return round_groups(groups, scale, offset, self.low, self.high).reshape(weight.shape)

    def _steps(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The scale and the offset of each part: [out, in / part]."""
        scale = _level(self.d, self.block_scale, self.scales, self.part_scale, self.layout.scale_range)
        if self.dmin is None or self.minima is None:
            return scale.flatten(1), None
        limits = self.layout.minimum_range
        offset = _level(self.dmin, self.block_minimum, self.minima, self.part_minimum, limits)
        return scale.flatten(1), offset.flatten(1)

    @torch.no_grad()
    def export(self, weight: torch.Tensor) -> Bytes:
        """Rows of blocks, [out, bytes]: they decode to what `forward` gives, bit for bit."""
        scale, offset = self._steps()
        groups = weight.reshape(len(weight), -1, self.layout.part)
        codes = codes_of(groups, scale, offset, self.low, self.high)
        has = self.dmin is not None
        blocks = Blocks(
            _column(_half(self.d, self.block_scale)),
            _whole(self.scales, self.part_scale, self.layout.scale_range),
            codes.to(torch.int16).reshape(-1, self.format.block_size).cpu().numpy(),
            _column(_half(self.dmin, self.block_minimum)) if self.dmin is not None else None,
            _whole(self.minima, self.part_minimum, self.layout.minimum_range) if has else None,
        )
        return pack(self.format, blocks).reshape(len(weight), -1)


def _level(
    block: torch.Tensor,
    block_factor: torch.Tensor | None,
    numbers: torch.Tensor,
    factor: torch.Tensor | None,
    limits: tuple[int, int] | None,
) -> torch.Tensor:
    d = _half(block, block_factor)
    if factor is None or limits is None:
        return d
    return d * whole_numbers(numbers * factor.exp(), *limits)


def _half(block: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    assert factor is not None
    return stored_as(block * factor.exp(), torch.float16)


def _column(values: torch.Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = values.reshape(-1).cpu().numpy()
    return array


def _whole(
    numbers: torch.Tensor | None, factor: torch.Tensor | None, limits: tuple[int, int] | None
) -> npt.NDArray[np.int16]:
    assert numbers is not None
    values = numbers if factor is None or limits is None else whole_numbers(numbers * factor.exp(), *limits)
    array: npt.NDArray[np.int16] = values.to(torch.int16).flatten(0, 1).cpu().numpy()
    return array


def encode(
    weight: npt.NDArray[np.float32],
    fmt: QuantFormat,
    importance: npt.NDArray[np.float32] | None,
    *,
    threads: int | None,
    name: str,
) -> Bytes:
    """Rows of blocks as `nybble quantize` makes them. Raises CheckpointError for a weight that the type cannot hold."""
    rows, columns = weight.shape
    out = np.empty((rows, fmt.row_bytes(columns)), np.uint8)
    bad = _native.Encoder(threads=threads).encode_into(
        to=fmt.name,
        source_format="F32",
        source=np.ascontiguousarray(weight).reshape(-1).view(np.uint8).data,
        rows=rows,
        cols=columns,
        out=out.reshape(-1),
        importance=importance,
    )
    if bad >= 0:
        raise CheckpointError(
            f"row {bad} of the tensor {name!r} has a weight too large for {fmt.name}: check the model"
        )
    return out
