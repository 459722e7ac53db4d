"""Whether two models hold the same values: every tensor is decoded from both and compared, a few rows at a time.

Two values are the same if their bits are, or if both are zero or both NaN: `-0` is a matter of the order of operations
in which containers define their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt

from nybble.checkpoint import Checkpoint, Tensor
from nybble.compress.methods import Progress
from nybble.core.errors import CheckpointError
from nybble.core.spec import ModelSpec
from nybble.formats.dialects.logical import Logical
from nybble.formats.safetensors import SafeTensor
from nybble.formats.stored import read_array
from nybble.quant.reference import dequantize
from nybble.quant.weights import E4M3_VALUES, PackedWeight

Floats = npt.NDArray[np.float32]

_CHUNK = 1 << 22  # values that are decoded at a time
_FLOATS = ("F32", "F16", "BF16")


@dataclass(slots=True)
class Values:
    """A tensor that can be decoded by rows. read: rows [begin, end) of it, [end - begin, width]."""

    shape: tuple[int, ...]
    read: Callable[[int, int], npt.NDArray[np.floating | np.integer]]
    release: Callable[[], None] = field(default=lambda: None)

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor that is not the same. largest: absolute difference; share: of the tensor's largest value."""

    name: str
    num_changed: int
    size: int
    largest: float
    share: float


@dataclass(frozen=True, slots=True)
class Proof:
    """What the comparison found."""

    num_tensors: int
    changes: tuple[Change, ...] = ()

    @property
    def lossless(self) -> bool:
        return not self.changes

    def sentence(self) -> str:
        """For people: what is equal, or what has changed most and by how much."""
        if self.lossless:
            return f"lossless: {self.num_tensors} tensors equal"
        worst = max(self.changes, key=lambda change: change.share)
        values = sum(change.num_changed for change in self.changes)
        return (
            f"not lossless: {values} values in {len(self.changes)} of {self.num_tensors} tensors changed, most in "
            f"{worst.name}, by up to {worst.largest:.3g} ({worst.share:.2g} of its largest value)"
        )

    def demand(self, where: str) -> None:
        """Raises CheckpointError if a value has changed."""
        if self.changes:
            raise CheckpointError(
                f"{where} is not written, because its values would not be those of the source: {self.sentence()}"
            )


def compare(before: Mapping[str, Values], after: Mapping[str, Values], progress: Progress, where: str) -> Proof:
    """Decode and compare every tensor. Raises CheckpointError if one model lacks a tensor of the other."""
    different = sorted(set(before) ^ set(after))
    if different:
        raise CheckpointError(f"{where}: the tensor {different[0]!r} is not in both models, so they are not the same")
    changes = []
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape:
            raise CheckpointError(f"{where}: {name!r} has the shape {list(new.shape)} instead of {list(old.shape)}")
        change = _compare_one(name, old, new)
        if change is not None:
            changes.append(change)
        old.release()
        new.release()
        progress.advance(old.size, f"compare {name}")
    return Proof(len(before), tuple(changes))


def _compare_one(name: str, old: Values, new: Values) -> Change | None:
    step = max(1, _CHUNK * old.num_rows // max(old.size, 1))
    count, largest, scale = 0, 0.0, 0.0
    for begin in range(0, old.num_rows, step):
        end = min(begin + step, old.num_rows)
        a, b = old.read(begin, end), new.read(begin, end)
        # NaN is the only value that is not equal to itself.
        differs = ~((a == b) | ((a != a) & (b != b)))
        count += int(differs.sum())
        if a.size:
            scale = max(scale, float(np.nanmax(np.abs(a.astype(np.float64)), initial=0.0)))
        if differs.any():
            largest = max(largest, float(np.abs(a[differs].astype(np.float64) - b[differs]).max()))
    return Change(name, count, old.size, largest, largest / scale if scale else 0.0) if count else None


def values_of(checkpoint: Checkpoint, packed: Mapping[str, Logical] | None = None) -> dict[str, Values]:
    """A model's tensors by their canonical names, q and k with the rows in a folder's order.

    packed: quantised matrices by the folder's names, where they are to be read otherwise than the checkpoint does.
    """
    found = {}
    for name, tensor in checkpoint.tensors.items():
        source = checkpoint.sources[name]
        if tensor.packed is not None:
            logical = (packed or {}).get(source.name)
            read = tensor.packed if logical is None else logical.read
            rows = source.rows if logical is not None else None
            found[name] = packed_values(tensor.shape, read, rows[0] if rows else 0)
        else:
            found[name] = _stored_values(tensor, row_order(checkpoint.spec, name))
        found[name].release = _releasing(checkpoint, tensor, found[name].release)
    return found


def _releasing(checkpoint: Checkpoint, tensor: Tensor, before: Callable[[], None]) -> Callable[[], None]:
    def release() -> None:
        before()
        checkpoint.release(tensor)

    return release


def row_order(spec: ModelSpec, name: str) -> npt.NDArray[np.intp] | None:
    """Which row of the file each row of a folder's tensor is; None where they are the same."""
    if not name.startswith("layers."):
        return None
    _, index, inner = name.split(".", 2)
    layer = spec.layers[int(index)]
    heads = {"attn.q": layer.num_q_heads, "attn.k": layer.num_kv_heads}.get(inner.removesuffix(".bias"))
    if heads is None or not layer.rope.interleaved:
        return None
    return np.arange(heads * layer.head_dim).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _stored_values(tensor: Tensor, order: npt.NDArray[np.intp] | None) -> Values:
    count = tensor.shape[0]

    def read(begin: int, end: int) -> Floats:
        rows = np.frombuffer(tensor.data, np.uint8).reshape(count, -1)
        chosen = rows[begin:end] if order is None else rows[order[begin:end]]
        values = dequantize(tensor.format, chosen.reshape(-1).data).reshape(end - begin, -1)
        return values + np.float32(1) if tensor.plus_one else values

    return Values(tensor.shape, read)


def packed_values(shape: tuple[int, ...], load: Callable[[], PackedWeight], first_row: int = 0) -> Values:
    """A quantised matrix, or the rows of it from `first_row`: taken out of its file once, decoded by rows."""
    held: list[PackedWeight | _Decoded] = []

    def read(begin: int, end: int) -> Floats:
        if not held:
            held.append(load())
        try:
            return held[0].rows(first_row + begin, first_row + end).decode()
        except ValueError:  # blocks that span rows cannot be cut
            held[0] = _Decoded(held[0].decode())
            return read(begin, end)

    return Values(shape, read, held.clear)


class _Decoded:
    """A matrix whose blocks cannot be cut at rows, decoded whole."""

    def __init__(self, values: Floats) -> None:
        self._values = values

    def rows(self, begin: int, end: int) -> _Decoded:
        return _Decoded(self._values[begin:end])

    def decode(self) -> Floats:
        return self._values


def plain_values(tensor: SafeTensor) -> Values:
    """A tensor of a folder that is not quantised; integers as they are."""
    rows = tensor.shape[0] if tensor.shape else 1

    def read(begin: int, end: int) -> npt.NDArray[np.floating | np.integer]:
        array = read_array(tensor).reshape(rows, -1)[begin:end]
        if tensor.format.name == "F8_E4M3":
            return np.asarray(E4M3_VALUES[array])
        if tensor.format.name == "BF16":
            return (array.astype(np.uint32) << 16).view(np.float32)
        return np.asarray(array.astype(np.float32) if tensor.format.name in _FLOATS else array)

    return Values(tensor.shape, read, lambda: tensor.file.release(tensor.begin, tensor.end))
