"""8-bit floats: e4m3 of OCP (no infinities, largest 448), with a scale per row."""

from __future__ import annotations

import numpy as np
import torch

from nybble.quant.weights import Float8

_LARGEST = 448.0


def quantize_float8(weight: torch.Tensor, scale_dtype: torch.dtype) -> Float8:
    """weight: float32 [out, in]. The largest weight of each row becomes the largest code.

    scale_dtype: what the file keeps scales in, to which they are rounded before any weight is.
    """
    limits = torch.finfo(scale_dtype)
    scale = (weight.abs().amax(dim=1, keepdim=True) / _LARGEST).clamp(min=limits.tiny, max=limits.max)
    scale = scale.to(scale_dtype).float()
    codes = (weight / scale).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return Float8(np.ascontiguousarray(codes.view(torch.uint8).numpy()), scale.numpy())
