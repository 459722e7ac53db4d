"""The processes that train together: one alone, or as many as `torchrun` started, each with shards of the weights.

Sharding is FSDP2's (`torch.distributed.fsdp.fully_shard`): a process holds a part of each parameter, of its gradient
and of the optimizer's state, and gets the rest of a layer only while it computes with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import nn

from nybble.backends.torch.trainable import TrainableDecoder
from nybble.core.errors import ConfigError

_FACTS = "facts:"  # no tensor is called so


@dataclass(frozen=True, slots=True)
class Group:
    """rank: of this process, 0 to size - 1. Process 0 is the one that writes files and speaks."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def shard(self, model: TrainableDecoder) -> None:
        """Onto the device; with several processes, spread over them."""
        model.to(self.device)
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in model.blocks():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    @contextmanager
    def whole(self, *modules: nn.Module) -> Iterator[None]:
        """All of the modules' parameters in this process, for as long as the block lasts. Every process must come."""
        sharded: list[Any] = [module for module in modules if self.size > 1]
        for module in sharded:
            module.unshard()
        try:
            yield
        finally:
            for module in sharded:
                module.reshard()

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Over the processes."""
        if self.size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
            values = values / self.size
        return values

    def share(
        self, facts: Any, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """What process 0 has: facts that JSON can say, and tensors by name. Sent as safetensors, never pickled."""
        if self.size == 1:
            return facts, dict(tensors or {})
        packed = torch.empty(0, dtype=torch.uint8)
        if self.leads:
            words = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
            own = {name: tensor.contiguous() for name, tensor in (tensors or {}).items()}
            packed = torch.frombuffer(bytearray(save({_FACTS: words, **own})), dtype=torch.uint8)
        length = torch.tensor([packed.numel()], device=self.device)
        dist.broadcast(length, src=0)
        sent = packed.to(self.device) if self.leads else torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(sent, src=0)
        found = load(sent.cpu().numpy().tobytes())
        return json.loads(found.pop(_FACTS).numpy().tobytes()), found


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded. Every process must come."""
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def copy_whole(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Fill a tensor that may be sharded from all of its values."""
    with torch.no_grad():
        if hasattr(target, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            spread: Any = target
            whole = distribute_tensor(whole.to(target.device), spread.device_mesh, spread.placements)
        target.copy_(whole)


@contextmanager
def joined() -> Iterator[Group]:
    """This process's place among those that `torchrun` started; alone without it.

    Raises ConfigError if torchrun's variables do not make sense.
    """
    size, rank, local = (
        _number(name, default) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size == 1:
        yield Group(0, 1, device)
        return
    if not 0 <= rank < size:
        raise ConfigError(f"RANK {rank} is not one of {size} processes: start them with torchrun")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(rank, size, device)
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"the environment variable {name} is {text!r:.40}, not a number: start with torchrun")
    return int(text)
