"""From a checkpoint's tensor to the matrix that a device multiplies."""

from __future__ import annotations

import logging

import torch

from nybble.backends.torch.ops.low_bit.linear import DenseLinear, Linear
from nybble.checkpoint import Tensor

_LOG = logging.getLogger(__name__)


def pack_linear(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Linear:
    """The matrix of `tensor` on `device`; dtype: of dense weights, and of what activations will come as."""
    if tensor.format.name not in ("F32", "F16", "BF16"):
        _LOG.info("%s is %s: kept as %s", tensor.name, tensor.format.name, dtype)
    return DenseLinear(torch.from_numpy(tensor.to_float32()).to(device, dtype))
