"""How long a pass will take, about: from parts of its work, measured on this machine for a moment.

What grows with the number of weights is measured on one small matrix. What grows faster, with the square or the cube of
a matrix's width, is counted in operations and told by the speed of a matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from nybble.backends.torch import TorchDecoder
from nybble.compress.calibration.stream import BAND
from nybble.compress.safetensors.model import FolderModel, Module
from nybble.compress.safetensors.options import Options, num_tokens, sample_tokens

_SIDE = 1024
_ROWS, _COLUMNS = 512, 1024
_TOKENS = 1024  # run through one layer


def rounding_seconds(model: FolderModel, round_one: Callable[[torch.Tensor], object], group_size: int = 128) -> float:
    """Of all linears, from one of `round_one` on a smaller one, and of decoding them before."""
    modules = list(model.all_modules())
    size = max(1, group_size)
    inputs = max(size, min(_COLUMNS, max(module.inputs for module in modules)) // size * size)
    weight = torch.randn(_ROWS, inputs, generator=torch.Generator().manual_seed(0)) * 0.02
    each = _seconds(lambda: round_one(weight)) / weight.numel()
    first = modules[0]
    each += _seconds(lambda: model.read_module(first)) / first.num_weights
    return each * sum(module.num_weights for module in modules)


def forward_seconds(model: FolderModel, options: Options, passes: float) -> float:
    """Of running all calibration samples so many times through all layers, from some tokens through the first."""
    length = sample_tokens(options)
    layer = TorchDecoder(model.checkpoint, context=length).layer(0, length)
    x = torch.randn(max(1, _TOKENS // length), length, model.spec.hidden_size)
    each = _seconds(lambda: layer.forward(x)) / (x.shape[0] * length)
    return each * num_tokens(options) * model.num_layers * passes


def hessian_seconds(model: FolderModel, options: Options) -> float:
    """Of adding up x x^T for every group of linears, of which the half above the diagonal is computed, in bands."""
    squares = sum(width * (width + BAND) for width in _group_widths(model))
    return squares * num_tokens(options) * _seconds_per_operation()


def inverse_seconds(model: FolderModel, per_cube: float) -> float:
    """Of so many operations per cube of the inputs of every group of linears: what GPTQ does to H."""
    return per_cube * sum(width**3 for width in _group_widths(model)) * _seconds_per_operation()


def product_seconds(model: FolderModel, per_weight_and_input: float) -> float:
    """Of so many operations per weight and input of every linear: of products W H, beyond those of the small matrix."""
    excess = sum(module.num_weights * max(0, module.inputs - _COLUMNS) for module in model.all_modules())
    return per_weight_and_input * excess * _seconds_per_operation()


def search_seconds(model: FolderModel, search: Callable[[torch.Tensor], object], rows: int, products: int) -> float:
    """Of searching something on so many rows of every group of linears, with so many products W H."""
    widths = _group_widths(model)
    columns = min(_COLUMNS, *widths)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    each = _seconds(lambda: search(weight)) / columns
    excess = sum(width * (width - columns) for width in widths)
    return each * sum(widths) + 2.0 * products * rows * excess * _seconds_per_operation()


def _group_widths(model: FolderModel) -> list[int]:
    """Inputs of each group of linears of each layer."""
    found: list[int] = []
    for layer in range(model.num_layers):
        groups: dict[int, Module] = {module.group: module for module in model.modules(layer)}
        found += [module.inputs for module in groups.values()]
    return found


def _seconds_per_operation() -> float:
    a = torch.ones(_SIDE, _SIDE)
    return _seconds(lambda: a @ a) / (2.0 * _SIDE**3)


def _seconds(work: Callable[[], object]) -> float:
    """The second run counts: the first allocates."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
