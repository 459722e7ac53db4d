"""Which implementation runs an operation: the Triton kernel, or plain torch.

NYBBLE_TORCH_OPS=auto (the default) takes the kernels on a GPU and plain torch elsewhere; `triton` takes the kernels
everywhere, on a CPU under Triton's interpreter, which is slow and for tests; `torch` never takes them.
"""

from __future__ import annotations

from typing import Any

import torch

from nybble.core import env
from nybble.core.errors import ConfigError

try:
    import triton
except ImportError:  # not on every platform
    triton = None

if triton is not None:
    from nybble.backends.torch.ops import kernels as _kernels

# Untyped, because on some platforms it is None. `runs_kernels` says when it may be used.
kernels: Any = None if triton is None else _kernels

__all__ = ["kernels", "runs_kernels"]


def runs_kernels(x: torch.Tensor) -> bool:
    """Whether the kernels run on tensors like this one.

    Raises:
        ConfigError: they were asked for and cannot run.
    """
    wanted = env.torch_ops()
    if wanted == "torch" or (wanted == "auto" and (not x.is_cuda or kernels is None)):
        return False
    if kernels is None:
        raise ConfigError("NYBBLE_TORCH_OPS=triton needs the package triton, which is not here: install nybble[cuda]")
    if not x.is_cuda and not kernels.interpreted():
        raise ConfigError(
            f"NYBBLE_TORCH_OPS=triton: the tensors are on {x.device.type!r}, where kernels only run in Triton's "
            "interpreter: set TRITON_INTERPRET=1 before Python starts, or NYBBLE_TORCH_OPS=auto"
        )
    return True
