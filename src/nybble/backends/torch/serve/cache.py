"""The paged cache of keys and values: for each layer a tensor of blocks, on the layer's device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from nybble.backends.torch.serve.inputs import BLOCK_SIZE
from nybble.core.errors import ConfigError
from nybble.core.spec import LayerSpec

QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class LayerCache:
    """k, v: [blocks, block_size, kv_heads, head_dim]; with scales [blocks, block_size, kv_heads] for int8 and fp8."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def parts(self) -> list[torch.Tensor]:
        return [part for part in (self.k, self.v, self.k_scale, self.v_scale) if part is not None]


def layer_block_bytes(layer: LayerSpec, kind: torch.dtype) -> int:
    """Bytes of the keys and values of one block in one layer, scales included."""
    per_head = layer.head_dim * kind.itemsize + (4 if kind in QUANTISED.values() else 0)
    return 2 * BLOCK_SIZE * layer.num_kv_heads * per_head


class PagedCache:
    """The caches of all layers. kind: the type of keys and values.

    Raises:
        ConfigError: there is no memory for it.
    """

    def __init__(
        self, layers: Sequence[LayerSpec], devices: Sequence[torch.device], num_blocks: int, kind: torch.dtype
    ) -> None:
        self.num_blocks = num_blocks
        self.kind = kind
        self.block_bytes = sum(layer_block_bytes(layer, kind) for layer in layers)
        try:
            self.layers = [_layer(spec, device, num_blocks, kind) for spec, device in zip(layers, devices, strict=True)]
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            raise ConfigError(
                f"there is not enough memory for a cache of {num_blocks} blocks "
                f"({num_blocks * self.block_bytes / 1e9:.2f} GB): ask for a smaller context, or lower "
                "gpu_memory_utilization or kv_cache_memory"
            ) from error

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def copy(self, pairs: npt.NDArray[np.int32]) -> None:
        """Copy blocks, (from, to), one after the other. Raises ValueError if there is no such block."""
        self.check(pairs)
        for begin, end in pairs.tolist():
            for layer in self.layers:
                for part in layer.parts:
                    part[end].copy_(part[begin])

    def read(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.uint8]:
        """Copies of blocks as bytes [ids, block_bytes]. Raises ValueError if there is no such block."""
        self.check(ids)
        index = torch.from_numpy(ids.astype(np.int64))
        columns = [
            part.view(torch.uint8)[index.to(part.device)].reshape(len(ids), -1).cpu()
            for layer in self.layers
            for part in layer.parts
        ]
        return torch.cat(columns, dim=1).numpy()

    def write(self, ids: npt.NDArray[np.int32], data: npt.NDArray[np.uint8]) -> None:
        """Fill blocks from bytes. Raises ValueError if there is no such block, or `data` does not fit."""
        self.check(ids)
        if data.shape != (len(ids), self.block_bytes) or data.dtype != np.uint8:
            raise ValueError(f"{len(ids)} blocks take bytes [{len(ids)}, {self.block_bytes}], not {list(data.shape)}")
        index, begin = torch.from_numpy(ids.astype(np.int64)), 0
        for layer in self.layers:
            for part in layer.parts:
                raw = part.view(torch.uint8)  # the last dimension in bytes
                end = begin + raw[0].numel()
                columns = torch.from_numpy(np.ascontiguousarray(data[:, begin:end]))
                raw[index.to(part.device)] = columns.reshape(len(ids), *raw.shape[1:]).to(part.device)
                begin = end

    def check(self, ids: npt.NDArray[np.int32]) -> None:
        """Raises ValueError if there is no such block."""
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_blocks):
            raise ValueError(f"there are {self.num_blocks} blocks, and one that is not there was named")


def _layer(spec: LayerSpec, device: torch.device, num_blocks: int, kind: torch.dtype) -> LayerCache:
    shape = (num_blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim)

    def scales() -> torch.Tensor | None:
        return _zeros(shape[:3], torch.float32, device) if kind in QUANTISED.values() else None

    k, v = (_zeros(shape, kind, device) for _ in range(2))
    return LayerCache(k, v, scales(), scales())


def _zeros(shape: tuple[int, ...], kind: torch.dtype, device: torch.device) -> torch.Tensor:
    """On the CPU numpy's: they take memory only where they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=kind, device=device)
    raw = np.zeros(prod(shape) * kind.itemsize, np.uint8)
    return torch.from_numpy(raw).view(kind).view(shape)


class CacheBlocks:
    """Blocks of one cache as bytes, layer after layer."""

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers."""
        return self._cache.block_bytes

    def read(self, ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Copies of blocks, [ids, block_bytes]. Raises ValueError if there is no such block."""
        return self._cache.read(np.array(ids, np.int32))

    def write(self, ids: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """Fill blocks from [ids, block_bytes]. Raises ValueError if there is no such block, or `data` does not fit."""
        self._cache.write(np.array(ids, np.int32), data)
