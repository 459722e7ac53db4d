"""A matrix as its dialect means it, whatever tensors a file spreads it over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nybble.core.errors import CheckpointError
from nybble.formats.safetensors import SafeTensor
from nybble.quant.weights import PackedWeight

Tensors = Mapping[str, SafeTensor]


@dataclass(frozen=True, slots=True)
class Logical:
    """name: as an unquantised folder would call it (`...q_proj.weight`). parts: the stored tensors, the codes first.

    read: takes it out of the file. Raises CheckpointError if its values cannot be right.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    parts: tuple[SafeTensor, ...]
    read: Callable[[], PackedWeight]


def part(tensors: Tensors, name: str, kinds: tuple[str, ...], where: str) -> SafeTensor:
    """A tensor of one of these types. Raises CheckpointError if it is missing or of another type."""
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{where}: the tensor {name!r} is missing: get a complete folder")
    if tensor.format.name not in kinds:
        raise CheckpointError(f"{where}: the tensor {name!r} has the type {tensor.format.name}, not {kinds[0]}")
    return tensor


def damaged(where: str, name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: the tensor {name!r} {what}: the folder is damaged, get it again")


def number_in(config: Mapping[str, object], key: str, choices: tuple[int, ...], where: str) -> int:
    """A whole number of a quantisation config. Raises CheckpointError if it is missing or none of the choices."""
    value = config.get(key)
    if type(value) is not int or (choices and value not in choices):
        wanted = f"one of {', '.join(map(str, choices))}" if choices else "a whole number"
        raise CheckpointError(f"{where}: the quantisation config has {key} = {value!r}, which must be {wanted}")
    return value


def group_size_in(config: Mapping[str, object], where: str) -> int:
    """Inputs per group, -1 for whole rows."""
    size = config.get("group_size", -1)
    size = -1 if size is None else size
    if type(size) is not int or not (size == -1 or 1 <= size <= 1 << 20):
        raise CheckpointError(
            f"{where}: the quantisation config has group_size = {size!r}, which is no size of a group"
        )
    return size
