"""The processes of one model, connected through torch.distributed: sums for its layers, and orders from rank 0.

Orders are two tensors of fixed form, numbers and a payload of int32: nothing is pickled between ranks. Everything
listens on 127.0.0.1 only. There is no process group of torch's own making, so a process may have several models.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed

dist: Any = torch.distributed  # much of it is not in its types
_HOST = "127.0.0.1"
_NUMBERS = 8  # of an order: what it is, six arguments, and the length of its payload
_IDLE = timedelta(days=365)  # a server may wait long for its next request
Ints = npt.NDArray[np.int32]


class Order(IntEnum):
    """What rank 0 tells the others to do, at the same time as it does it itself."""

    STEP = 1  # arguments: HostInputs.header; payload: to_flat
    NEW_CACHE = 2  # number of blocks
    COPY_BLOCKS = 3  # payload: pairs
    FIT_BLOCKS = 4  # tokens, sequences
    LOGITS = 5  # rows; payload: float32 hidden states
    STOP = 6


def listen() -> tuple[int, int]:
    """A socket on a free port of 127.0.0.1, for a store to take over: its descriptor and the port."""
    listener = socket.socket()
    listener.bind((_HOST, 0))
    listener.listen(64)
    port: int = listener.getsockname()[1]
    return listener.detach(), port


def open_store(port: int, *, descriptor: int | None, seconds: float) -> Any:
    """Where the ranks find each other. descriptor: what `listen` gave, on rank 0."""
    timeout = timedelta(seconds=seconds)
    if descriptor is None:
        return dist.TCPStore(_HOST, port, is_master=False, timeout=timeout)
    return dist.TCPStore(
        _HOST, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=descriptor
    )


class Ranks:
    """A `Group` of processes. device: of this one; seconds: that a rank may take for its part of a step."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device, *, seconds: float) -> None:
        self.rank = rank
        self.size = size
        self._device = device
        self._orders = _gloo(dist.PrefixStore("orders", store), rank, size, _IDLE)
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=seconds)
            self._sums: Any = dist.ProcessGroupNCCL(dist.PrefixStore("sums", store), rank, size, options)
        else:
            self._sums = _gloo(dist.PrefixStore("sums", store), rank, size, timedelta(seconds=seconds))

    # ---- for layers ----

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        self._sums.allreduce([x]).wait()
        return x

    def gather_columns(self, x: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
        widest = max(widths)
        mine = x if x.shape[1] == widest else torch.nn.functional.pad(x, (0, widest - x.shape[1]))
        parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in widths]
        self._sums.allgather([parts], [mine.contiguous()]).wait()
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def smallest(self, number: int) -> int:
        """The smallest of all ranks' numbers, on each of them."""
        value = torch.tensor([number])
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        self._orders.allreduce([value], options).wait()
        return int(value)

    # ---- orders ----

    def tell(self, order: Order, arguments: tuple[int, ...] = (), payload: Ints | None = None) -> None:
        """Rank 0: all others hear it."""
        numbers = torch.zeros(_NUMBERS, dtype=torch.int64)
        sent = torch.from_numpy(np.zeros(0, np.int32) if payload is None else np.ascontiguousarray(payload.reshape(-1)))
        numbers[: len(arguments) + 1] = torch.tensor([int(order), *arguments])
        numbers[-1] = len(sent)
        self._orders.broadcast(numbers, 0).wait()
        if len(sent):
            self._orders.broadcast(sent, 0).wait()

    def hear(self) -> tuple[Order, tuple[int, ...], Ints]:
        """The other ranks: wait for the next order. RuntimeError if rank 0 is gone."""
        numbers = torch.zeros(_NUMBERS, dtype=torch.int64)
        self._orders.broadcast(numbers, 0).wait()
        payload = torch.zeros(int(numbers[-1]), dtype=torch.int32)
        if len(payload):
            self._orders.broadcast(payload, 0).wait()
        values = numbers.tolist()
        return Order(values[0]), tuple(values[1:-1]), payload.numpy()

    def abort(self) -> None:
        """Stop waiting for the others: what runs on the device ends with an error."""
        if hasattr(self._sums, "abort"):
            self._sums.abort()


def _gloo(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=_HOST)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)
