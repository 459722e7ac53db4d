"""The models that a server answers with: loaded when they are asked for, and put away when nobody does any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TypeVar

from nybble.core.errors import ModelNotFoundError
from nybble.engine.async_engine import AsyncEngine
from nybble.engine.roofline import Roofline
from nybble.serve.admission import Admission
from nybble.serve.background import heard, in_thread
from nybble.serve.errors import ApiError
from nybble.serve.loading import Loader, adapter_of, adapter_size, engine_key
from nybble.serve.lookup import Lookup
from nybble.serve.metrics import Metrics
from nybble.serve.openai.job import ChunkStream, Server
from nybble.serve.preset import Preset
from nybble.serve.settings import ServeSettings
from nybble.serve.slots import DEFAULT, FOR_EVER, KeepAlive, Resident, Slot
from nybble.store import ModelName, StoredModel
from nybble.store.library import Library

__all__ = ["DEFAULT", "KEEP_ALIVE", "KeepAlive", "Models", "Resident"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

KEEP_ALIVE = 300.0  # seconds
_LOADERS = 2  # threads
_RETRY_SECONDS = 5
_LEAVE_SECONDS = 5.0  # how long a shutdown waits for models that are still being loaded


class Models:
    """All models of one server. Belongs to one event loop.

    library: where names come from; None if the server has one model only. memory: bytes that all models together may
    take. keep_alive: seconds for which a model stays after it was used last; negative: for ever.
    """

    def __init__(
        self,
        settings: ServeSettings,
        *,
        library: Library | None,
        loader: Loader | None = None,
        memory: int = 2**63,
        keep_alive: float = KEEP_ALIVE,
        roofline: Roofline | None = None,
    ) -> None:
        self.library = library
        self.settings = settings
        self.admission = Admission(settings)
        self.metrics = Metrics(lambda: self.admission.num_refused, roofline, by_model=library is not None)
        self.memory = memory
        self.started = int(time.time())
        self.pinned: Resident | None = None  # the only one, which stays
        self._lookup = None if library is None else Lookup(library)
        self._loader = loader or Loader()
        self._keep_alive = keep_alive
        self._slots: dict[str, Slot] = {}  # by what engines are told apart by
        self._by_name: dict[str, Slot] = {}  # by ModelName.key
        self._leaving: set[Slot] = set()  # still in memory, but no more to be had
        self._loaders = asyncio.Semaphore(_LOADERS)
        self._changed = asyncio.Event()  # memory was given back, or a model is no longer wanted

    @classmethod
    def of_one(
        cls,
        engine: AsyncEngine,
        settings: ServeSettings,
        roofline: Roofline | None = None,
        stored: StoredModel | None = None,
        size: int = 0,
        *,
        adapter: str | None = None,
        adapters: Mapping[str, str] | None = None,
    ) -> Models:
        """Nothing but this model, under the name that the settings say, and what adapters make of it.

        size: of its weights and cache, in bytes. adapter: the engine's id of its own. adapters: ids of those that are
        models of their own, by their names.
        """
        models = cls(settings, library=None, roofline=roofline)
        name = settings.model_name
        slot = models._slots[""] = Slot("", name, keep_alive=-1, base_size=size, engine=engine, is_pinned=True)
        slot.adapter_bytes = {one.id: one.weights.memory_bytes for one in engine.adapters()}
        slot.metrics = models.metrics.for_model(name, engine.stats, slot.size)
        models.pinned = models._add_resident(slot, name, stored, adapter)
        for other, one in (adapters or {}).items():
            models._add_resident(slot, other, stored, one, parent=name)
        return models

    # ---- what routes use ----

    def lease(self, name: str, *, keep_alive: KeepAlive = DEFAULT) -> AbstractAsyncContextManager[Resident]:
        """The model of this name, loaded first if need be, and held as long as the context lasts.

        keep_alive: seconds for which it stays in memory afterwards; 0 not at all, negative for ever. By default what
        the last request that said it said.

        Raises:
            ApiError: 404 there is no such model; 503 with Retry-After, there is no room beside models in use.
            NybbleError: it cannot be loaded.
        """
        return self._lease(name, keep_alive)

    async def answer(self, name: str, make: Callable[[Resident], Awaitable[T]]) -> T:
        """What `make` answers with a model. A ChunkStream holds the model until it has been sent.

        Raises:
            ApiError, NybbleError: as `lease` and `make` do.
        """
        async with AsyncExitStack() as stack:
            made = await make(await stack.enter_async_context(self.lease(name)))
            if isinstance(made, ChunkStream):
                made.hold(stack.pop_all())
            return made

    def resident(self) -> list[Resident]:
        """The models in memory, the one that was used last first."""
        slots = sorted(self._slots.values(), key=lambda slot: -slot.last_used)
        return [resident for slot in slots for resident in slot.residents.values()]

    def in_memory(self, name: str) -> Resident | None:
        """The model of this name if it need not be loaded."""
        key = name_key(name)
        slot = self._by_name.get(key)
        return None if slot is None else slot.residents.get(key)

    def meant(self, name: str | None) -> str:
        """The name that a request means which gives none: that of the only model.

        Raises:
            ApiError: 400, there are several.
        """
        if name is not None:
            return name
        if self.pinned is not None:
            return self.pinned.name
        resident = self.resident()
        if len(resident) == 1:
            return resident[0].name
        raise ApiError(400, "this server has many models: say which one is meant", param="model")

    async def find(self, name: str) -> tuple[str, float]:
        """A model as in `names`.

        Raises:
            ApiError: 404 there is no such model.
        """
        if self._lookup is None:
            return self._pinned(name).name, self.started
        stored = await self._lookup.find(name)
        return str(stored.name), stored.modified

    async def names(self) -> list[tuple[str, float]]:
        """What can be asked for, and since when: seconds since 1970."""
        if self._lookup is None:
            return [(one.name, self.started) for one in self.resident()]
        return [(str(stored.name), stored.modified) for stored in await self._lookup.all()]

    async def unload(self, name: str) -> bool:
        """Put a model out of memory, or let that happen when those that use it are done. False: it is not there.

        Models that share an engine with others only lose their adapter.
        """
        slot = self._by_name.get(name_key(name))
        if slot is None or slot.is_pinned:
            return False
        if len(slot.names) > 1:
            self._forget(name_key(name))
            return True
        if slot.users:
            slot.keep_alive = 0
            return True
        self._retire(slot)
        await self._closed(slot)
        return True

    def is_healthy(self) -> bool:
        """Whether models can answer. One of several that has died is loaded again when it is asked for."""
        return self.pinned is None or self.pinned.server.engine.is_healthy()

    async def shutdown(self, drain_timeout: float | None) -> None:
        """End all models: after what runs has ended, or after so many seconds; None ends it at once."""
        self.admission.is_open = False
        slots = {*self._slots.values(), *self._leaving}
        loading = [slot.loading for slot in slots if slot.loading is not None]
        if loading:
            await asyncio.wait(loading, timeout=drain_timeout or _LEAVE_SECONDS)
        for slot in slots:
            slot.stop_timer()
        engines = [slot.engine for slot in slots if slot.engine is not None]
        await asyncio.gather(*(engine.shutdown(drain_timeout=drain_timeout) for engine in engines))
        closing = [slot.closing for slot in slots if slot.closing is not None]
        if closing:
            await asyncio.wait(closing)

    # ---- leases ----

    @asynccontextmanager
    async def _lease(self, name: str, keep_alive: KeepAlive) -> AsyncIterator[Resident]:
        if self._lookup is None:
            resident = self._pinned(name)
            yield resident
            resident.slot.last_used = time.monotonic()
            return
        stored = await self._lookup.find(name)
        slot = await self._slot_for(stored)
        slot.users += 1
        slot.stop_timer()
        # Others that share the engine are not put away with this one.
        only_this = keep_alive == 0 and len(slot.names) > 1
        if keep_alive is not DEFAULT and not only_this:
            slot.keep_alive = keep_alive
        try:
            if slot.engine is None:
                assert slot.loading is not None
                await asyncio.shield(slot.loading)  # others may wait for it too
            resident = await self._ready(slot, stored)
            slot.touch()
            with _used_by_one(resident):
                yield resident
        finally:
            slot.users -= 1
            if only_this and self._by_name.get(stored.name.key) is slot:
                self._forget(stored.name.key)
            self._used(slot)

    def _pinned(self, name: str) -> Resident:
        """Raises ApiError: there is no such model on this server."""
        resident = self.in_memory(name)
        if resident is None:
            names = " and ".join(repr(one.name) for one in self.resident()[:8])
            raise ApiError(
                404,
                f"the model {name!r:.200} does not exist; this server has {names}",
                param="model",
                code="model_not_found",
            )
        return resident

    async def _slot_for(self, stored: StoredModel) -> Slot:
        """Memory for a model, with its name on it."""
        slot = self._current(stored)
        if slot is None:
            size = await asyncio.to_thread(self._loader.size, stored)
            # Nothing is awaited from here on, so two requests cannot both make room.
            slot = self._current(stored) or self._open(stored, size)
        slot.names.add(stored.name.key)
        self._by_name[stored.name.key] = slot
        return slot

    def _current(self, stored: StoredModel) -> Slot | None:
        """The slot that this model, as it is on the disk now, can be answered from. Raises StoreError."""
        key = engine_key(stored)
        named = self._by_name.get(stored.name.key)
        if named is not None and named.key != key:
            self._forget(stored.name.key)
        slot = self._slots.get(key)
        if slot is not None and slot.engine is not None and not slot.engine.is_healthy():
            self._retire(slot)
            return None
        return slot

    def _forget(self, name: str) -> None:
        """This name stands for something else from now on; an engine that has no other leaves."""
        slot = self._by_name.pop(name)
        slot.drop(name)
        if not slot.names:
            self._retire(slot)

    def _used(self, slot: Slot) -> None:
        """Somebody has left."""
        slot.last_used = time.monotonic()
        if slot.users:
            return
        if slot in self._leaving:
            self._close(slot)
        elif self._slots.get(slot.key) is not slot:
            return  # it could not be loaded
        elif slot.keep_alive == 0 or (slot.engine is not None and not slot.residents):
            self._retire(slot)  # its time is over, or none of its models could be made ready
        else:
            slot.touch()
            if 0 < slot.keep_alive < FOR_EVER:
                slot.timer = asyncio.get_running_loop().call_later(slot.keep_alive, self._retire, slot)

    # ---- models of a slot ----

    async def _ready(self, slot: Slot, stored: StoredModel) -> Resident:
        """The model as it is on the disk now, its adapter loaded.

        Raises:
            ApiError: 503, there is no room for the adapter.
            NybbleError: the adapter cannot be used.
        """
        key = stored.name.key
        while True:
            resident = slot.residents.get(key)
            if resident is not None and resident.stored is not None and resident.stored.digest == stored.digest:
                return resident
            async with slot.adapting:
                before = slot.residents.get(key)
                if before is not resident:
                    continue  # somebody else has made it ready meanwhile
                adapter = await self._adapter(slot, stored)
                if before is not None:
                    slot.drop(key)
                    slot.names.add(key)
                return self._add_resident(slot, str(stored.name), stored, adapter, parent=stored.parent)

    async def _adapter(self, slot: Slot, stored: StoredModel) -> str | None:
        """The engine's id of a model's adapter; None if it has none."""
        path = adapter_of(stored)
        engine = slot.engine
        if path is None or engine is None:
            return None
        size = await asyncio.to_thread(adapter_size, path)
        for victim in self._victims(str(stored.name), size):
            self._retire(victim)
        slot.reserved_bytes = size
        try:
            adapter = await engine.load_adapter(path)
        finally:
            slot.reserved_bytes = 0
        for one in engine.adapters():
            if one.id == adapter:
                slot.adapter_bytes[adapter] = one.weights.memory_bytes
        return adapter

    def _add_resident(
        self, slot: Slot, name: str, stored: StoredModel | None, adapter: str | None, parent: str | None = None
    ) -> Resident:
        assert slot.engine is not None and slot.metrics is not None
        settings = replace(self.settings, model_name=name)
        metrics = slot.metrics if slot.is_pinned or slot.metrics.name == name else self.metrics.also(name, slot.metrics)
        preset = Preset.of(stored)
        server = Server(slot.engine, settings, self.admission, metrics, self.started, preset, adapter)
        key = name_key(name)
        resident = slot.residents[key] = Resident(name, server, stored, slot, parent)
        if self._slots.get(slot.key) is slot:  # else it is leaving, and the name is another's
            slot.names.add(key)
            self._by_name[key] = slot
        return resident

    # ---- memory ----

    def _open(self, stored: StoredModel, size: int) -> Slot:
        """A slot for a model, which begins to load.

        Raises:
            ApiError: 503, there is no room.
        """
        if not self.admission.is_open:
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": str(_RETRY_SECONDS)})
        for victim in self._victims(str(stored.name), size):
            logger.info("%s makes room for %s", victim.name, stored.name)
            self._retire(victim)
        key = engine_key(stored)
        slot = self._slots[key] = Slot(key, str(stored.name), self._keep_alive, size)
        slot.loading = asyncio.create_task(self._load(slot, stored))
        slot.loading.add_done_callback(heard)
        return slot

    def _victims(self, name: str, size: int) -> list[Slot]:
        """The models to put away for so many bytes, the one that was used longest ago first."""
        if size > self.memory:
            raise ApiError(
                503,
                f"{name} needs {size / 1e9:.2f} GB and all models together may take {self.memory / 1e9:.2f} GB: "
                "start the server with more --model-memory, or less --ctx or --kv-cache-memory",
                code="model_too_large",
            )
        slots = [*self._slots.values(), *self._leaving]
        room = self.memory - sum(slot.size for slot in slots if slot not in self._leaving or slot.users)
        idle = [slot for slot in self._slots.values() if not slot.users and slot.engine is not None]
        victims = []
        for slot in sorted(idle, key=lambda slot: slot.last_used):
            if room >= size:
                break
            victims.append(slot)
            room += slot.size
        if room < size:
            busy = ", ".join(sorted(slot.name for slot in slots if slot.users or slot.engine is None))
            raise ApiError(
                503,
                f"there is no room for {name} ({size / 1e9:.2f} GB of {self.memory / 1e9:.2f} GB) beside what is in "
                f"use: {busy}; try again later",
                code="no_room",
                headers={"Retry-After": str(max(self.admission.seconds_left(), _RETRY_SECONDS))},
            )
        return victims

    async def _load(self, slot: Slot, stored: StoredModel) -> AsyncEngine:
        begin = time.monotonic()
        try:
            while self._num_bytes() > self.memory:  # those that make room are on their way out
                await self._changed.wait()
                if slot in self._leaving and not slot.users:
                    raise ApiError(503, f"{stored.name} was unloaded before it had been loaded")
            async with self._loaders:
                engine = await in_thread(lambda: self._loader.load(stored))
        except BaseException as error:
            self._leaving.discard(slot)
            self._remove(slot)
            self._tell()
            if isinstance(error, MemoryError):
                raise ApiError(503, f"there is not enough memory to load {stored.name}") from error
            raise
        slot.load_seconds = time.monotonic() - begin
        slot.engine = engine
        slot.metrics = self.metrics.for_model(str(stored.name), engine.stats, slot.size)
        logger.info("%s was loaded in %.1f s and takes %.2f GB", stored.name, slot.load_seconds, slot.size / 1e9)
        if slot in self._leaving and not slot.users:
            self._close(slot)
        return engine

    def _num_bytes(self) -> int:
        return sum(slot.size for slot in (*self._slots.values(), *self._leaving))

    def _remove(self, slot: Slot) -> None:
        """Nobody finds it any more."""
        if self._slots.get(slot.key) is slot:
            del self._slots[slot.key]
        for name in slot.names:
            if self._by_name.get(name) is slot:
                del self._by_name[name]

    def _retire(self, slot: Slot) -> None:
        """No more requests for it; it is closed when it has been loaded and nobody uses it."""
        slot.stop_timer()
        self._remove(slot)
        self._leaving.add(slot)
        if not slot.users and slot.engine is not None:
            self._close(slot)
        self._tell()

    def _close(self, slot: Slot) -> None:
        if slot.closing is None and slot.engine is not None:
            slot.closing = asyncio.create_task(self._end_of(slot, slot.engine))

    async def _end_of(self, slot: Slot, engine: AsyncEngine) -> None:
        if slot.metrics is not None:
            self.metrics.forget(slot.metrics)
        await engine.shutdown(drain_timeout=None)
        slot.engine = None
        slot.residents.clear()
        self._leaving.discard(slot)
        self._tell()
        logger.info("%s is out of memory", slot.name)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _closed(self, slot: Slot) -> None:
        if slot.loading is not None:
            await asyncio.wait([slot.loading])
        if slot.closing is not None:
            await asyncio.shield(slot.closing)


def name_key(name: str) -> str:
    """What names of models are compared by."""
    try:
        return ModelName.parse(name).key
    except ModelNotFoundError:  # of a file, such as "My model (1)"
        return name


@contextmanager
def _used_by_one(resident: Resident) -> Iterator[None]:
    resident.users += 1
    try:
        yield
    finally:
        resident.users -= 1
        resident.slot.release(resident)
