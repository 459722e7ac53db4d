"""What a model computes in and where, from the options: types, devices, and whether its weights fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod

import torch

from nybble.backends.device import DEFAULT_UTILISATION, DeviceOptions
from nybble.backends.torch.parallel.group import Alone, Group
from nybble.backends.torch.parallel.shard import make_shard
from nybble.backends.torch.serve.cache import QUANTISED, layer_block_bytes
from nybble.backends.torch.serve.decoder import Decoder
from nybble.backends.torch.serve.inputs import BLOCK_SIZE
from nybble.backends.torch.serve.memory import free_bytes
from nybble.backends.torch.serve.rank import Rank
from nybble.backends.torch.serve.weights import is_float
from nybble.checkpoint import Checkpoint, Tensor
from nybble.core.errors import ConfigError
from nybble.core.spec import ModelSpec

_DTYPES = {
    "bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16, "float32": torch.float32,
    "float": torch.float32,
}  # fmt: skip
_CPU = torch.device("cpu")
# Of a GPU, beside weights and cache: the library's own buffers and the activations of a step.
_WORKING_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Setup:
    """device: that embeds and has the head; devices: of each layer; kind: of keys and values."""

    device: torch.device
    devices: tuple[torch.device, ...]
    dtype: torch.dtype
    kind: torch.dtype
    graphs: bool


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels start on the thread's present GPU, which inside is this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def torch_device(name: str) -> torch.device:
    """From what `resolve_device` gives, with a number for a GPU, as tensors name it."""
    if name == "torch-cpu":
        return _CPU
    device = torch.device(name)
    return torch.device("cuda", device.index or 0)


def chosen_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 on a GPU that has it, float16 on an older one, float32 on the CPU."""
    if name != "auto":
        return _DTYPES[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def cache_kind(name: str, dtype: torch.dtype) -> torch.dtype:
    """f16 is whatever the model computes in: in float32, the reference, as in the native backend nothing is rounded."""
    return QUANTISED.get(name, dtype)


def weight_bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype, prefix: str = "") -> int:
    """Bytes that tensors whose name begins so will take: floats in `dtype`, everything else as it is stored."""
    total = 0
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            total += prod(tensor.shape) * dtype.itemsize if is_float(tensor) else len(tensor.data)
    return total


def place_layers(layer_bytes: Sequence[int], budget: int) -> int:
    """How many layers, from the first one on, fit in `budget` bytes."""
    for count, size in enumerate(layer_bytes):
        budget -= size
        if budget < 0:
            return count
    return len(layer_bytes)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes on a GPU. ends: of the embedding, the head and the last norm; layers, caches: of each layer."""

    ends: int
    layers: list[int]
    caches: list[int]

    @property
    def total(self) -> int:
        return self.ends + sum(self.layers) + sum(self.caches)


def model_sizes(
    spec: ModelSpec, tensors: Mapping[str, Tensor], dtype: torch.dtype, kind: torch.dtype, context: int
) -> Sizes:
    """What weights, and keys and values of one sequence as long as the context, will take."""
    blocks = -(-context // BLOCK_SIZE)
    caches = [blocks * layer_block_bytes(layer, kind) for layer in spec.layers]
    layers = [weight_bytes(tensors, dtype, f"layers.{i}.") for i in range(len(spec.layers))]
    ends = weight_bytes(tensors, dtype) - sum(layers)
    embed = tensors["embed"]
    if not is_float(embed):  # its rows are decoded; a tied head has the codes
        ends += prod(embed.shape) * dtype.itemsize - (0 if spec.tied_head else len(embed.data))
    return Sizes(ends, layers, caches)


def make_setup(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    options: DeviceOptions,
    device: torch.device,
    *,
    context: int,
    kv_cache_type: str,
    free_bytes: int | None,
    beside: torch.device = _CPU,
) -> Setup:
    """free_bytes: of the device; None where it does not count. beside: where layers go that do not fit.

    Raises:
        ConfigError: the weights, or the cache of one sequence beside them, do not fit.
    """
    dtype = chosen_dtype(options.dtype, device)
    kind = cache_kind(kv_cache_type, dtype)
    graphs = device.type == "cuda" and not options.enforce_eager and options.tensor_parallel_size == 1
    everything = Setup(device, (device,) * len(spec.layers), dtype, kind, graphs)
    if free_bytes is None:
        return everything
    share = options.gpu_memory_utilization or DEFAULT_UTILISATION
    budget = max(int(free_bytes * share) - min(_WORKING_BYTES, free_bytes // 8), 0)
    sizes = model_sizes(spec, tensors, dtype, kind, context)
    if sizes.total <= budget:
        return everything
    can_be_used = f"{budget / 1e9:.2f} GB of {device} can be used ({free_bytes / 1e9:.2f} GB are free)"
    if options.device_map is None:
        raise ConfigError(
            f"the weights take {(sizes.ends + sum(sizes.layers)) / 1e9:.2f} GB and the cache of {context} tokens "
            f"{sum(sizes.caches) / 1e9:.2f} GB, and {can_be_used}: lower max_model_len, quantise the model, set "
            "device_map to 'auto' (layers that do not fit run on the CPU) or tensor_parallel_size to more GPUs"
        )
    both = [a + b for a, b in zip(sizes.layers, sizes.caches, strict=True)]
    count = place_layers(both, budget - sizes.ends)
    if count == 0:
        raise ConfigError(
            f"the embedding and the head take {sizes.ends / 1e9:.2f} GB and a layer {both[0] / 1e9:.2f} GB, and "
            f"{can_be_used}: run the model with device 'cpu'"
        )
    devices = (device,) * count + (beside,) * (len(spec.layers) - count)
    return Setup(device, devices, dtype, kind, graphs=False)


def load_rank(
    checkpoint: Checkpoint,
    options: DeviceOptions,
    device: torch.device,
    *,
    context: int,
    kv_cache_type: str,
    group: Group | None = None,
) -> tuple[Rank, Setup]:
    """A process's part of a model, its weights on their devices. group: the processes; None if it is alone.

    Raises:
        CheckpointError: a tensor cannot be run.
        ConfigError: weights or cache do not fit, or the model cannot be split so.
    """
    group = Alone() if group is None else group
    shard = make_shard(checkpoint, group.rank, group.size)
    free = free_bytes(device)
    setup = make_setup(
        shard.spec, shard.tensors, options, device, context=context, kv_cache_type=kv_cache_type, free_bytes=free
    )
    try:
        with on_device(device):
            decoder = Decoder(
                shard, context=context, dtype=setup.dtype, device=device, devices=setup.devices, group=group
            )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the weights of {checkpoint.path} do not fit on {device}, where {(free or 0) / 1e9:.2f} GB were free: "
            "quantise the model, or set device_map to 'auto' or tensor_parallel_size to more GPUs"
        ) from error
    return Rank(decoder, context=context, kind=setup.kind, graphs=setup.graphs), setup
