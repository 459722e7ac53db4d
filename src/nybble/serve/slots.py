"""What a server keeps of a model in memory: its engine, and the names that the engine answers to."""

from __future__ import annotations

import asyncio
import enum
import time
from dataclasses import dataclass, field
from typing import Final, Literal

from nybble.engine.async_engine import AsyncEngine
from nybble.serve.metrics import ModelMetrics
from nybble.serve.openai.job import Server
from nybble.store import StoredModel

FOR_EVER = 10 * 365 * 86400.0  # seconds


class _Default(enum.Enum):
    DEFAULT = "what the server or an earlier request says"


DEFAULT: Final = _Default.DEFAULT
KeepAlive = float | Literal[_Default.DEFAULT]


@dataclass(eq=False)
class Resident:
    """A model in memory.

    name: what clients call it. stored: None for a model that was given as a path. parent: the model whose weights an
    adapter changes, where that is one of this server. users: how many hold it now.
    """

    name: str
    server: Server
    stored: StoredModel | None
    slot: Slot
    parent: str | None = None
    users: int = 0
    is_forgotten: bool = False  # its name stands for something else by now

    @property
    def size(self) -> int:
        """Bytes of its weights and cache, and of the adapters beside them."""
        return self.slot.size

    @property
    def expires_at(self) -> float | None:
        """Seconds since 1970; None if it stays."""
        return self.slot.expires_at

    @property
    def load_seconds(self) -> float:
        """How long loading took."""
        return self.slot.load_seconds


@dataclass(eq=False)
class Slot:
    """Memory that an engine has, or is about to get. Models that differ in adapters and presets only share one.

    key: what engines are told apart by. name: of the model that it was made for. names: of all models that it is for,
    by ModelName.key; residents: those of them that are ready.
    """

    key: str
    name: str
    keep_alive: float
    base_size: int
    names: set[str] = field(default_factory=set)
    residents: dict[str, Resident] = field(default_factory=dict)
    adapter_bytes: dict[str, int] = field(default_factory=dict)  # by the engine's ids of adapters
    reserved_bytes: int = 0  # for an adapter that is being loaded
    users: int = 0
    engine: AsyncEngine | None = None
    metrics: ModelMetrics | None = None
    loading: asyncio.Task[AsyncEngine] | None = None
    closing: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    adapting: asyncio.Lock = field(default_factory=asyncio.Lock)
    last_used: float = 0.0
    expires_at: float | None = None
    load_seconds: float = 0.0
    is_pinned: bool = False

    @property
    def size(self) -> int:
        """Bytes of weights, cache and adapters."""
        return self.base_size + sum(self.adapter_bytes.values()) + self.reserved_bytes

    def touch(self) -> None:
        """Somebody uses it: it stays for its time from now on."""
        self.expires_at = time.time() + self.keep_alive if 0 <= self.keep_alive < FOR_EVER else None

    def stop_timer(self) -> None:
        """It does not leave by itself any more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def drop(self, name: str) -> None:
        """A name stands for something else from now on. Its adapter goes when nobody uses it any more."""
        self.names.discard(name)
        resident = self.residents.pop(name, None)
        if resident is not None:
            resident.is_forgotten = True
            self.release(resident)

    def release(self, resident: Resident) -> None:
        """Let go of the adapter of a forgotten model if that was the last to use it."""
        adapter = resident.server.adapter
        if adapter is None or resident.users or not resident.is_forgotten or self.engine is None:
            return
        if adapter in self.adapter_bytes and all(one.server.adapter != adapter for one in self.residents.values()):
            del self.adapter_bytes[adapter]
            self.engine.unload_adapter(adapter)
