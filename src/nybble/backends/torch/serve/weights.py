"""A layer's weights, ready to be multiplied. Linears that read the same input are one where their encodings agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from nybble.backends.torch import ops
from nybble.backends.torch.ops.low_bit import DenseLinear
from nybble.backends.torch.serve.adapter import LayerAdapters
from nybble.checkpoint import Tensor
from nybble.core import env
from nybble.core.errors import CheckpointError
from nybble.quant.reference import dequantize

_ROWS_AT_ONCE = 8192  # of the embedding, decoded to float32 on the way
_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.int16}  # numpy has no bfloat16: its bits
# Gives the part's tensor of this name, or None if the model has none.
Find = Callable[[str], Tensor | None]


@dataclass(frozen=True, slots=True)
class _Packed:
    """One product for several linears. names and widths: of its parts, in the order of its outputs."""

    names: tuple[str, ...]
    widths: tuple[int, ...]
    linear: ops.Linear
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor, adapters: LayerAdapters | None) -> tuple[torch.Tensor, ...]:
        y = self.linear(x)
        if self.bias is not None:
            y = y + self.bias
        parts = torch.split(y, list(self.widths), dim=-1)
        if adapters is not None:
            for name, part in zip(self.names, parts, strict=True):
                adapters.add(name, x, part)
        return parts


class LayerWeights:
    """find: tensors by their names in the layer (`attn.q`, `ffn_norm`). device, dtype: where and how they compute."""

    def __init__(self, find: Find, device: torch.device, dtype: torch.dtype) -> None:
        self._find = find
        self._device = device
        self._dtype = dtype
        self._vectors: dict[str, torch.Tensor] = {}
        for name in ("attn_norm", "ffn_norm", "attn.q_norm", "attn.k_norm", "attn.post_norm", "ffn.post_norm"):
            tensor = find(name)
            if tensor is not None:
                self._vectors[name] = vector(tensor, device, torch.float32)
        self._qkv = self._pack(("attn.q", "attn.k", "attn.v"))
        self._ffn_in = self._pack(("ffn.gate", "ffn.up"))
        self._single = {name: self._pack((name,))[0] for name in ("attn.o", "ffn.down")}

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def nbytes(self) -> int:
        """Of the matrices and vectors."""
        many = (*self._qkv, *self._ffn_in, *self._single.values())
        return sum(one.linear.bytes for one in many) + sum(one.nbytes for one in self._vectors.values())

    def vector(self, name: str) -> torch.Tensor:
        """A norm's weight."""
        return self._vectors[name]

    def qkv(self, x: torch.Tensor, adapters: LayerAdapters | None) -> list[torch.Tensor]:
        return [part for one in self._qkv for part in one(x, adapters)]

    def ffn_in(self, x: torch.Tensor, adapters: LayerAdapters | None) -> list[torch.Tensor]:
        """Gate and up."""
        return [part for one in self._ffn_in for part in one(x, adapters)]

    def linear(self, name: str, x: torch.Tensor, adapters: LayerAdapters | None) -> torch.Tensor:
        """attn.o or ffn.down."""
        return self._single[name](x, adapters)[0]

    def _pack(self, names: tuple[str, ...]) -> list[_Packed]:
        found = []
        for name in names:
            tensor = self._find(name)
            assert tensor is not None  # a checkpoint has all tensors of its spec
            found.append(tensor)
        if len(names) > 1 and not can_join(found):
            return [one for name in names for one in self._pack((name,))]
        linear = make_linear(join(found), self._device, self._dtype)
        return [_Packed(names, tuple(t.shape[0] for t in found), linear, self._bias(names, found))]

    def _bias(self, names: Sequence[str], found: Sequence[Tensor]) -> torch.Tensor | None:
        stored = [self._find(f"{name}.bias") for name in names]
        if all(one is None for one in stored):
            return None
        parts = [
            torch.zeros(tensor.shape[0], device=self._device, dtype=self._dtype)
            if one is None
            else vector(one, self._device, self._dtype)
            for one, tensor in zip(stored, found, strict=True)
        ]
        return torch.cat(parts)


def make_linear(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> ops.Linear:
    """A matrix ready to be multiplied: its codes on a GPU, decoded on the CPU, where torch has no product for them."""
    if is_float(tensor) or (device.type == "cpu" and env.torch_ops() != "triton"):
        return DenseLinear(float_values(tensor).to(device).to(dtype))
    return ops.pack_linear(tensor, device, dtype)


def is_float(tensor: Tensor) -> bool:
    """Whether it is stored as floats, to be used as they are."""
    return tensor.packed is None and tensor.format.name in _FLOATS and not tensor.plus_one


def float_values(tensor: Tensor) -> torch.Tensor:
    """On the CPU, in the type in which it is stored, or float32 of codes."""
    if not is_float(tensor):
        return torch.from_numpy(tensor.to_float32())
    stored = np.frombuffer(tensor.data, _FLOATS[tensor.format.name]).reshape(tensor.shape)
    values = torch.from_numpy(stored.copy())
    return values.view(torch.bfloat16) if tensor.format.name == "BF16" else values


def vector(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A norm or a bias. Raises CheckpointError if it holds a NaN or an infinity."""
    values = tensor.to_float32()
    if not np.isfinite(values).all():
        raise CheckpointError(f"the tensor {tensor.name!r} holds a NaN or an infinity: get the file again")
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)


def can_join(tensors: Sequence[Tensor]) -> bool:
    """Whether rows of these matrices can lie below each other in one."""
    first = tensors[0]
    return all(
        t.packed is None and not t.plus_one and t.format == first.format and t.shape[1:] == first.shape[1:]
        for t in tensors
    )


def join(tensors: Sequence[Tensor]) -> Tensor:
    """One matrix with the rows of all."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    data = b"".join(t.data for t in tensors)
    rows = sum(t.shape[0] for t in tensors)
    return Tensor("+".join(t.name for t in tensors), (rows, *first.shape[1:]), first.format, memoryview(data))


class Embedding:
    """Rows of the vocabulary, in the type that is computed with.

    On a GPU the table is decoded once, and takes 16 bits a value. On the CPU it stays as it is stored, and the rows of
    a step are decoded. begin: the first token that this part has; a token of another part is a row of zeros.
    """

    def __init__(
        self,
        tensor: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        *,
        begin: int = 0,
        whole: bool = True,
        table: torch.Tensor | None = None,
    ) -> None:
        """table: the rows, if a head has them already. whole: there is no other part."""
        self._device = device
        self._dtype = dtype
        self._begin = begin
        self._rows = tensor.shape[0]
        self._whole = whole
        self._format = tensor.format
        self._stored = np.zeros((0, 0), np.uint8)
        self._table = table
        self.nbytes = 0
        if table is None:
            self._read(tensor)
            self.nbytes = self._stored.nbytes + (0 if self._table is None else self._table.nbytes)

    def _read(self, tensor: Tensor) -> None:
        if tensor.packed is not None or is_float(tensor):
            self._table = float_values(tensor).to(self._device).to(self._dtype)
            return
        self._stored = np.frombuffer(tensor.data, np.uint8).reshape(self._rows, -1)
        if self._device.type == "cpu":
            self._stored = self._stored.copy()
            return
        self._table = torch.empty(tensor.shape, dtype=self._dtype, device=self._device)
        for at in range(0, self._rows, _ROWS_AT_ONCE):
            self._table[at : at + _ROWS_AT_ONCE] = self._decode(self._stored[at : at + _ROWS_AT_ONCE])
        self._stored = np.zeros((0, 0), np.uint8)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] on the device -> [tokens, hidden_size]."""
        local = token_ids - self._begin
        inside = None if self._whole else (local >= 0) & (local < self._rows)
        if inside is not None:
            local = torch.where(inside, local, 0)
        table = self._table
        rows = self._decode(self._stored[local.numpy()]) if table is None else F.embedding(local, table)
        return rows if inside is None else rows * inside[:, None].to(rows.dtype)

    def _decode(self, stored: npt.NDArray[np.uint8]) -> torch.Tensor:
        values = dequantize(self._format, np.ascontiguousarray(stored).reshape(-1).data)
        return torch.from_numpy(values.reshape(len(stored), -1)).to(self._device, self._dtype)
