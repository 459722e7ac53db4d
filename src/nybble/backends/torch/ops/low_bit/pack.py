"""From a checkpoint's tensor to the matrix that a device multiplies."""

from __future__ import annotations

import logging
from typing import Literal, get_args

import numpy as np
import torch

from nybble.backends.torch.ops.low_bit.eight_bits import from_float8_rows, from_int8_rows, from_row_int8
from nybble.backends.torch.ops.low_bit.from_blocks import BLOCK_TYPES, from_blocks
from nybble.backends.torch.ops.low_bit.from_weights import from_codebook, from_float8, from_grouped
from nybble.backends.torch.ops.low_bit.linear import DenseLinear, Linear
from nybble.checkpoint import Tensor
from nybble.core.errors import ConfigError
from nybble.quant.weights import Codebook4, Float8, GroupedInt, PackedWeight, RowInt8

_LOG = logging.getLogger(__name__)
Activations = Literal["auto", "float", "float8"]
_DENSE = ("F32", "F16", "BF16")


def pack_linear(
    tensor: Tensor, device: torch.device | str, dtype: torch.dtype, *, activations: Activations = "auto"
) -> Linear:
    """The matrix of `tensor` on `device`, in its own encoding where there is a kernel for it.

    activations: what a product multiplies them as. `auto`: int8 with LLM.int8 and with symmetric 8-bit codes that have
    one scale per row (W8A8), float otherwise. `float`: never quantised. `float8`: as auto, and float8 with FP8 weights,
    which is faster with many tokens, and less exact.

    dtype: of weights that are floats, and of those whose encoding has no kernel, which are decoded once and for all;
    a line in the log says so. Activations come as they come.

    Raises:
        ConfigError: the tensor is no matrix, or there are no such activations.
        CheckpointError: it is damaged.
    """
    if len(tensor.shape) != 2:
        raise ConfigError(f"{tensor.name} has the shape {list(tensor.shape)}: only matrices can be multiplied")
    if activations not in get_args(Activations):
        raise ConfigError(f"activations must be one of {', '.join(get_args(Activations))}, not {activations!r}")
    linear: Linear | None = None
    if tensor.packed is not None:
        linear = _from_weight(tensor.packed(), device, activations)
    elif tensor.format.name in BLOCK_TYPES and not tensor.plus_one:
        linear = from_blocks(tensor, device)
    if linear is None:
        if tensor.format.name not in _DENSE:
            _LOG.info("%s is %s, which has no GPU kernel: kept as %s", tensor.name, tensor.format.name, dtype)
        linear = DenseLinear(torch.from_numpy(tensor.to_float32()).to(device, dtype))
    return linear


def _from_weight(weight: PackedWeight, device: torch.device | str, activations: Activations) -> Linear | None:
    if isinstance(weight, GroupedInt):
        both = None if activations == "float" else from_int8_rows(weight, device)
        return from_grouped(weight, device) if both is None else both
    if isinstance(weight, Codebook4):
        return from_codebook(weight, device)
    if isinstance(weight, Float8):
        both = from_float8_rows(weight, device) if activations == "float8" else None
        return from_float8(weight, device) if both is None else both
    if activations == "float":
        return from_grouped(_as_grouped(weight), device)
    return from_row_int8(weight, device)


def _as_grouped(weight: RowInt8) -> GroupedInt:
    scales = (weight.absmax * np.float32(1 / 127)).reshape(-1, 1)
    return GroupedInt(8, weight.shape[1], weight.codes.view(np.uint8) ^ np.uint8(128), scales)
