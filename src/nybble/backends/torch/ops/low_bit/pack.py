"""From a checkpoint's tensor to the matrix that a device multiplies."""

from __future__ import annotations

import logging

import torch

from nybble.backends.torch.ops.low_bit.coded import CodedLinear
from nybble.backends.torch.ops.low_bit.from_blocks import BLOCK_TYPES, from_blocks
from nybble.backends.torch.ops.low_bit.from_weights import from_codebook, from_float8, from_grouped
from nybble.backends.torch.ops.low_bit.linear import DenseLinear, Linear
from nybble.checkpoint import Tensor
from nybble.core.errors import ConfigError
from nybble.quant.weights import Codebook4, Float8, GroupedInt, PackedWeight

_LOG = logging.getLogger(__name__)
_DENSE = ("F32", "F16", "BF16")


def pack_linear(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Linear:
    """The matrix of `tensor` on `device`, in its own encoding where there is a kernel for it.

    dtype: of weights that are floats, and of those whose encoding has no kernel, which are decoded once and for all;
    a line in the log says so. Activations come as they come.

    Raises:
        ConfigError: the tensor is no matrix.
        CheckpointError: it is damaged.
    """
    if len(tensor.shape) != 2:
        raise ConfigError(f"{tensor.name} has the shape {list(tensor.shape)}: only matrices can be multiplied")
    linear: Linear | None = None
    if tensor.packed is not None:
        linear = _from_weight(tensor.packed(), device)
    elif tensor.format.name in BLOCK_TYPES and not tensor.plus_one:
        linear = from_blocks(tensor, device)
    if linear is None:
        if tensor.format.name not in _DENSE:
            _LOG.info("%s is %s, which has no GPU kernel: kept as %s", tensor.name, tensor.format.name, dtype)
        linear = DenseLinear(torch.from_numpy(tensor.to_float32()).to(device, dtype))
    return linear


def _from_weight(weight: PackedWeight, device: torch.device | str) -> CodedLinear | None:
    if isinstance(weight, GroupedInt):
        return from_grouped(weight, device)
    if isinstance(weight, Codebook4):
        return from_codebook(weight, device)
    if isinstance(weight, Float8):
        return from_float8(weight, device)
    return None
