"""From a grid's codes and parameters in torch to a weight that formats can write, and back into a layer."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import numpy as np
import torch

from nybble.compress.grids import Grid, GroupParams
from nybble.compress.safetensors.model import Floats, FolderModel, Module
from nybble.core.errors import CheckpointError
from nybble.quant.weights import GroupedInt

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


def grouped(
    stem: str, codes: torch.Tensor, params: GroupParams, grid: Grid, g_idx: torch.Tensor | None = None
) -> GroupedInt:
    """codes: uint8 [out, in]. Raises CheckpointError that names the linear if its scales do not fit the file."""
    if float(params.scale.abs().max()) >= torch.finfo(grid.scale_dtype).max:
        name = str(grid.scale_dtype).removeprefix("torch.")
        raise CheckpointError(f"{stem} has weights so large that their scales do not fit {name}: check the model")
    return GroupedInt(
        grid.bits,
        grid.size(codes.shape[1]),
        codes.numpy(),
        params.scale.numpy(),
        None if grid.symmetric else params.zero.numpy().astype(np.int16),
        None if g_idx is None else g_idx.numpy().astype(np.int32),
    )


def empty_grouped(shape: tuple[int, int], grid: Grid) -> GroupedInt:
    """Zeros, to see how large they are when they are stored."""
    size = grid.size(shape[1])
    scales = np.zeros((shape[0], shape[1] // size), np.float32)
    zeros = None if grid.symmetric else np.ones(scales.shape, np.int16)
    return GroupedInt(grid.bits, size, np.zeros(shape, np.uint8), scales, zeros)


def put(weights: MutableMapping[str, torch.Tensor], module: Module, values: Floats | torch.Tensor) -> None:
    """A linear's values into the layer that computes with them."""
    whole = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    for name, rows in zip(module.parts, torch.split(whole, list(module.rows)), strict=True):
        weights[name] = rows


def take(weights: Mapping[str, torch.Tensor], module: Module) -> torch.Tensor:
    """A linear's values as a layer has them, [out, in]."""
    parts = [weights[name] for name in module.parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def largest_layer_bytes(model: FolderModel) -> int:
    """Of all linears of one layer, as float32."""
    return max(4 * sum(m.num_weights for m in model.modules(i)) for i in range(model.num_layers))
