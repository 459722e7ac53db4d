"""Products with quantised weights, straight from their codes."""

from __future__ import annotations

from nybble.backends.torch.ops.low_bit.linear import DenseLinear, Linear
from nybble.backends.torch.ops.low_bit.pack import pack_linear

__all__ = ["DenseLinear", "Linear", "pack_linear"]
