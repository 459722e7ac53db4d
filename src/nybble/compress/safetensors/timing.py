"""How long a pass will take, about: from a matrix product and one rounding, measured on this machine for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from nybble.compress.safetensors.model import FolderModel

_SIDE = 1024
_ROWS, _COLUMNS = 512, 1024


def rounding_seconds(model: FolderModel, round_one: Callable[[torch.Tensor], object], group_size: int = 128) -> float:
    """Of all linears, from one of `round_one` on a smaller one."""
    modules = list(model.all_modules())
    size = max(1, group_size)
    inputs = max(size, min(_COLUMNS, max(module.inputs for module in modules)) // size * size)
    weight = torch.randn(_ROWS, inputs, generator=torch.Generator().manual_seed(0)) * 0.02
    return _seconds(lambda: round_one(weight)) * sum(module.num_weights for module in modules) / weight.numel()


def forward_seconds(model: FolderModel, num_tokens: int, passes: float) -> float:
    """Of running all linears over so many tokens so many times."""
    weights = sum(module.num_weights for module in model.all_modules())
    return 2.0 * weights * num_tokens * passes * _seconds_per_operation()


def hessian_seconds(model: FolderModel, num_tokens: int) -> float:
    """Of adding up x x^T for every group of linears."""
    squares = 0
    for layer in range(model.num_layers):
        squares += sum(width * width for width in {m.group: m.inputs for m in model.modules(layer)}.values())
    return 2.0 * squares * num_tokens * _seconds_per_operation()


def _seconds_per_operation() -> float:
    a = torch.ones(_SIDE, _SIDE)
    return _seconds(lambda: a @ a) / (2.0 * _SIDE**3)


def _seconds(work: Callable[[], object]) -> float:
    """The second run counts: the first allocates."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
