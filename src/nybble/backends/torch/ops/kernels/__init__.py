"""The Triton kernels, one to a file, each beside the function that starts it. Arguments have been checked already."""

from __future__ import annotations

from nybble.backends.torch.flash.numbers import interpreted
from nybble.backends.torch.ops.kernels.activation import gated_activation
from nybble.backends.torch.ops.kernels.draw_token import draw
from nybble.backends.torch.ops.kernels.eight_bit_product import product8
from nybble.backends.torch.ops.kernels.float_product import product
from nybble.backends.torch.ops.kernels.norm import rms_norm
from nybble.backends.torch.ops.kernels.paged import paged_attention
from nybble.backends.torch.ops.kernels.rope_store import rope_store_kv
from nybble.backends.torch.ops.kernels.store import store_kv

__all__ = [
    "draw",
    "gated_activation",
    "interpreted",
    "paged_attention",
    "product",
    "product8",
    "rms_norm",
    "rope_store_kv",
    "store_kv",
]
