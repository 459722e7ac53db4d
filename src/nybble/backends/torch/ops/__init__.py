"""The operations of the decoder on a device: Triton kernels on a GPU, plain torch elsewhere.

Each function checks its arguments and then chooses, per call (see `choice`), between the kernel and a readable
reference in plain torch with the same meaning. NYBBLE_TORCH_OPS=auto|triton|torch decides; docs/gpu.md.
"""

from __future__ import annotations

from nybble.backends.torch.ops.attention import paged_attention
from nybble.backends.torch.ops.elementwise import gated_activation, rms_norm
from nybble.backends.torch.ops.kv import rope_store_kv, store_kv
from nybble.backends.torch.ops.low_bit import Linear, pack_linear
from nybble.backends.torch.ops.sampling import sample, score

__all__ = [
    "Linear",
    "gated_activation",
    "pack_linear",
    "paged_attention",
    "rms_norm",
    "rope_store_kv",
    "sample",
    "score",
    "store_kv",
]
