"""The models that a server answers with: loaded when they are asked for, and put away when nobody does any more."""

from __future__ import annotations

import asyncio
import enum
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal, TypeVar

from nybble.core.errors import ModelNotFoundError
from nybble.engine.async_engine import AsyncEngine
from nybble.engine.roofline import Roofline
from nybble.serve.admission import Admission
from nybble.serve.errors import ApiError
from nybble.serve.loading import Loader
from nybble.serve.lookup import Lookup
from nybble.serve.metrics import Metrics
from nybble.serve.openai.job import ChunkStream, Server
from nybble.serve.preset import Preset
from nybble.serve.settings import ServeSettings
from nybble.store import ModelName, StoredModel
from nybble.store.library import Library

logger = logging.getLogger(__name__)

T = TypeVar("T")

KEEP_ALIVE = 300.0  # seconds
_FOR_EVER = 10 * 365 * 86400.0
_LOADERS = 2  # threads
_RETRY_SECONDS = 5
_LEAVE_SECONDS = 5.0  # how long a shutdown waits for models that are still being loaded


class _Default(enum.Enum):
    DEFAULT = "what the server or an earlier request says"


DEFAULT: Final = _Default.DEFAULT
KeepAlive = float | Literal[_Default.DEFAULT]


@dataclass(eq=False)
class Resident:
    """A model in memory.

    name: what clients call it. stored: None for a model that was given as a path. size: bytes of its weights and
    cache. expires_at: seconds since 1970, None if it stays. load_seconds: how long loading took.
    """

    name: str
    server: Server
    stored: StoredModel | None
    size: int
    expires_at: float | None
    load_seconds: float


@dataclass(eq=False)
class _Slot:
    """Memory that a model has, or is about to get."""

    key: str
    stored: StoredModel | None
    size: int
    keep_alive: float
    users: int = 0
    resident: Resident | None = None
    loading: asyncio.Task[Resident] | None = None
    closing: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None
    last_used: float = 0.0
    is_pinned: bool = False


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
        self._slots: dict[str, _Slot] = {}  # by ModelName.key
        self._leaving: set[_Slot] = set()  # still in memory, but no more to be had
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
    ) -> Models:
        """Nothing but this model, under the name that the settings say. size: of its weights and cache, in bytes."""
        models = cls(settings, library=None, roofline=roofline)
        name = settings.model_name
        slot = _Slot(_key(name), stored, size, keep_alive=-1, is_pinned=True)
        models.pinned = slot.resident = models._resident(name, engine, stored, size, None, 0.0)
        models._slots[slot.key] = slot
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
        return [slot.resident for slot in slots if slot.resident is not None]

    def in_memory(self, name: str) -> Resident | None:
        """The model of this name if it need not be loaded."""
        slot = self._slots.get(_key(name))
        return None if slot is None else slot.resident

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
            await self._slot_for(name)
            return self.settings.model_name, self.started
        stored = await self._lookup.find(name)
        return str(stored.name), stored.modified

    async def names(self) -> list[tuple[str, float]]:
        """What can be asked for, and since when: seconds since 1970."""
        if self._lookup is None:
            return [(one.name, self.started) for one in self.resident()]
        return [(str(stored.name), stored.modified) for stored in await self._lookup.all()]

    async def unload(self, name: str) -> bool:
        """Put a model out of memory, or let that happen when those that use it are done. False: it is not there."""
        slot = self._slots.get(_key(name))
        if slot is None or slot.is_pinned:
            return False
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
            self._stop_timer(slot)
        engines = [slot.resident.server.engine for slot in slots if slot.resident is not None]
        await asyncio.gather(*(engine.shutdown(drain_timeout=drain_timeout) for engine in engines))
        closing = [slot.closing for slot in slots if slot.closing is not None]
        if closing:
            await asyncio.wait(closing)

    # ---- leases ----

    @asynccontextmanager
    async def _lease(self, name: str, keep_alive: KeepAlive) -> AsyncIterator[Resident]:
        slot = await self._slot_for(name)
        slot.users += 1
        self._stop_timer(slot)
        if keep_alive is not DEFAULT and not slot.is_pinned:
            slot.keep_alive = keep_alive
        try:
            if slot.resident is None:
                assert slot.loading is not None
                await asyncio.shield(slot.loading)  # others may wait for it too
            assert slot.resident is not None
            slot.resident.expires_at = _end(slot.keep_alive)
            yield slot.resident
        finally:
            slot.users -= 1
            self._used(slot)

    async def _slot_for(self, name: str) -> _Slot:
        if self._lookup is None:
            slot = self._slots.get(_key(name))
            if slot is None:
                raise ApiError(
                    404,
                    f"the model {name!r} does not exist; this server has {self.settings.model_name!r}",
                    param="model",
                    code="model_not_found",
                )
            return slot
        stored = await self._lookup.find(name)
        slot = self._current(stored)
        if slot is None:
            size = await asyncio.to_thread(self._loader.size, stored)
            # Nothing is awaited from here on, so two requests cannot both make room.
            slot = self._current(stored) or self._open(stored, size)
        return slot

    def _current(self, stored: StoredModel) -> _Slot | None:
        """The slot of this model as it is on the disk now, and able to answer."""
        slot = self._slots.get(stored.name.key)
        if slot is None:
            return None
        is_dead = slot.resident is not None and not slot.resident.server.engine.is_healthy()
        if is_dead or slot.stored is None or slot.stored.digest != stored.digest:
            self._retire(slot)
            return None
        return slot

    def _used(self, slot: _Slot) -> None:
        """Somebody has left."""
        slot.last_used = time.monotonic()
        if slot.users:
            return
        if slot in self._leaving:
            self._close(slot)
        elif self._slots.get(slot.key) is not slot or slot.is_pinned:
            return  # it could not be loaded, or it stays anyhow
        elif slot.keep_alive == 0:
            self._retire(slot)
        else:
            if slot.resident is not None:
                slot.resident.expires_at = _end(slot.keep_alive)
            if 0 < slot.keep_alive < _FOR_EVER:
                slot.timer = asyncio.get_running_loop().call_later(slot.keep_alive, self._retire, slot)

    # ---- memory ----

    def _open(self, stored: StoredModel, size: int) -> _Slot:
        """A slot for a model, which begins to load.

        Raises:
            ApiError: 503, there is no room.
        """
        if not self.admission.is_open:
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": str(_RETRY_SECONDS)})
        for victim in self._victims(str(stored.name), size):
            logger.info("%s makes room for %s", victim.key, stored.name)
            self._retire(victim)
        slot = self._slots[stored.name.key] = _Slot(stored.name.key, stored, size, self._keep_alive)
        slot.loading = asyncio.create_task(self._load(slot, stored))
        slot.loading.add_done_callback(_heard)
        return slot

    def _victims(self, name: str, size: int) -> list[_Slot]:
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
        idle = [slot for slot in self._slots.values() if not slot.users and slot.resident is not None]
        victims = []
        for slot in sorted(idle, key=lambda slot: slot.last_used):
            if room >= size:
                break
            victims.append(slot)
            room += slot.size
        if room < size:
            busy = ", ".join(sorted(slot.key for slot in slots if slot.users or slot.resident is None))
            raise ApiError(
                503,
                f"there is no room for {name} ({size / 1e9:.2f} GB of {self.memory / 1e9:.2f} GB) beside what is in "
                f"use: {busy}; try again later",
                code="no_room",
                headers={"Retry-After": str(max(self.admission.seconds_left(), _RETRY_SECONDS))},
            )
        return victims

    async def _load(self, slot: _Slot, stored: StoredModel) -> Resident:
        begin = time.monotonic()
        try:
            while self._num_bytes() > self.memory:  # those that make room are on their way out
                await self._changed.wait()
                if slot in self._leaving and not slot.users:
                    raise ApiError(503, f"{stored.name} was unloaded before it had been loaded")
            async with self._loaders:
                engine = await _in_thread(lambda: self._loader.load(stored))
        except BaseException as error:
            self._leaving.discard(slot)
            if self._slots.get(slot.key) is slot:
                del self._slots[slot.key]
            self._tell()
            if isinstance(error, MemoryError):
                raise ApiError(503, f"there is not enough memory to load {stored.name}") from error
            raise
        seconds = time.monotonic() - begin
        slot.resident = self._resident(str(stored.name), engine, stored, slot.size, _end(slot.keep_alive), seconds)
        logger.info("%s was loaded in %.1f s and takes %.2f GB", stored.name, seconds, slot.size / 1e9)
        if slot in self._leaving and not slot.users:
            self._close(slot)
        return slot.resident

    def _resident(
        self,
        name: str,
        engine: AsyncEngine,
        stored: StoredModel | None,
        size: int,
        expires_at: float | None,
        load_seconds: float,
    ) -> Resident:
        settings = replace(self.settings, model_name=name)
        metrics = self.metrics.for_model(name, engine.stats, size)
        server = Server(engine, settings, self.admission, metrics, self.started, Preset.of(stored))
        return Resident(name, server, stored, size, expires_at, load_seconds)

    def _num_bytes(self) -> int:
        return sum(slot.size for slot in (*self._slots.values(), *self._leaving))

    def _retire(self, slot: _Slot) -> None:
        """No more requests for it; it is closed when it has been loaded and nobody uses it."""
        self._stop_timer(slot)
        if self._slots.get(slot.key) is slot:
            del self._slots[slot.key]
        self._leaving.add(slot)
        if not slot.users and slot.resident is not None:
            self._close(slot)
        self._tell()

    def _close(self, slot: _Slot) -> None:
        if slot.closing is None and slot.resident is not None:
            slot.closing = asyncio.create_task(self._end_of(slot, slot.resident))

    async def _end_of(self, slot: _Slot, resident: Resident) -> None:
        self.metrics.forget(resident.server.metrics)
        await resident.server.engine.shutdown(drain_timeout=None)
        slot.resident = None
        self._leaving.discard(slot)
        self._tell()
        logger.info("%s is out of memory", resident.name)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _closed(self, slot: _Slot) -> None:
        if slot.loading is not None:
            await asyncio.wait([slot.loading])
        if slot.closing is not None:
            await asyncio.shield(slot.closing)

    @staticmethod
    def _stop_timer(slot: _Slot) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
            slot.timer = None


def _key(name: str) -> str:
    try:
        return ModelName.parse(name).key
    except ModelNotFoundError:  # of a file, such as "My model (1)"
        return name


def _end(keep_alive: float) -> float | None:
    return time.time() + keep_alive if 0 <= keep_alive < _FOR_EVER else None


async def _in_thread(work: Callable[[], T]) -> T:
    """The result of `work`, done in a thread of its own that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(act: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(lambda: None if done.done() else act())

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            tell(partial(done.set_exception, error))
        else:
            tell(partial(done.set_result, result))

    threading.Thread(target=run, name="load-model", daemon=True).start()
    return await done


def _heard(task: asyncio.Task[Any]) -> None:
    """Without this, a failure that nobody waited for would be complained about."""
    if not task.cancelled():
        task.exception()
