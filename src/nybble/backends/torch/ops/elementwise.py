"""Normalisation with the residual sum, and the gated activation of feed-forward layers."""

from __future__ import annotations

from typing import overload

import torch

from nybble.backends.torch.ops import reference
from nybble.backends.torch.ops.choice import kernels, runs_kernels
from nybble.backends.torch.ops.reference import Activation
from nybble.core.errors import ConfigError


@overload
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: None = None) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x / rms(x) * weight over the last dimension; with a residual, that of x + residual, and the sum as well.

    x, residual: [tokens, hidden]. weight: [hidden], of any float type. Zhang and Sennrich 2019, arXiv 1910.07467.

    Raises:
        ConfigError: the shapes do not fit together.
    """
    if x.dim() < 2 or weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        more = "" if residual is None else f" and a residual {list(residual.shape)}"
        raise ConfigError(f"rms_norm: x {list(x.shape)} does not go with a weight {list(weight.shape)}{more}")
    run = kernels.rms_norm if runs_kernels(x) else reference.rms_norm
    normed, total = run(x, weight, eps, residual)
    return normed if residual is None else (normed, total)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: Activation) -> torch.Tensor:
    """silu(gate) * up (SwiGLU) or gelu_tanh(gate) * up (GeGLU), both [tokens, ffn_size].

    Shazeer 2020, arXiv 2002.05202.

    Raises:
        ConfigError: the shapes differ, or the kind is unknown.
    """
    if kind not in ("silu", "gelu_tanh"):
        raise ConfigError(f"there is no gated activation {kind!r}: it must be silu or gelu_tanh")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ConfigError(
            f"gated_activation: gate {list(gate.shape)} of {gate.dtype} does not go with "
            f"up {list(up.shape)} of {up.dtype}"
        )
    run = kernels.gated_activation if runs_kernels(gate) else reference.gated_activation
    return run(gate, up, kind)
