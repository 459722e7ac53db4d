"""The adapters that requests of an engine may name, and how those of a step are put together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nybble.adapter import Adapter, open_adapter
from nybble.backends.cpu import StepAdapter
from nybble.core.errors import ConfigError
from nybble.core.spec import ModelSpec

if TYPE_CHECKING:
    from nybble.engine.request import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter that is ready. id: the SHA-256 of its files; path: where it was first loaded from."""

    id: str
    path: Path
    rank: int
    weights: StepAdapter


class AdapterShelf:
    """Adapters by their ids. Safe on any thread: a request keeps what it got, whatever leaves the shelf.

    load: makes an adapter ready; without it this engine has none. max_rank: that an adapter may have.
    """

    def __init__(
        self,
        *,
        load: Callable[[Adapter], StepAdapter] | None = None,
        spec: ModelSpec | None = None,
        max_rank: int | None = None,
    ) -> None:
        self._load = load
        self._spec = spec
        self._max_rank = max_rank
        self._loaded: dict[str, LoadedAdapter] = {}
        self._lock = threading.Lock()

    def load(self, path: str | Path) -> str:
        """See EngineCore.load_adapter."""
        if self._load is None or self._spec is None:
            raise ConfigError("this engine was started without adapters")
        adapter = open_adapter(path, self._spec)
        if self._max_rank is not None and adapter.rank > self._max_rank:
            raise ConfigError(
                f"{path} has the rank {adapter.rank}, and max_lora_rank is {self._max_rank}: allow more, or take "
                "another adapter"
            )
        with self._lock:  # held while it is packed, so that two threads do not pack the same one
            if adapter.digest not in self._loaded:
                weights = self._load(adapter)
                self._loaded[adapter.digest] = LoadedAdapter(adapter.digest, Path(path), adapter.rank, weights)
        return adapter.digest

    def unload(self, adapter: str) -> None:
        """See EngineCore.unload_adapter."""
        if self._loaded.pop(adapter, None) is None:
            raise ConfigError(_unknown(adapter))

    def get(self, adapter: str) -> LoadedAdapter:
        """Raises ConfigError if no such adapter is loaded."""
        found = self._loaded.get(adapter)
        if found is None:
            raise ConfigError(_unknown(adapter))
        return found

    def all(self) -> tuple[LoadedAdapter, ...]:
        """In the order in which they were loaded."""
        return tuple(self._loaded.values())


def together(scheduled: list[tuple[Sequence, int]]) -> None:
    """Put sequences with the same adapter side by side, so that its weights are read once for all of them."""
    if any(sequence.request.adapter is not None for sequence, _ in scheduled):
        scheduled.sort(key=lambda pair: pair[0].request.adapter.id if pair[0].request.adapter else "")


def step_adapters(sequences: Iterable[Sequence]) -> tuple[tuple[StepAdapter, ...], npt.NDArray[np.int32] | None]:
    """The adapters of a step, and for each of its sequences which of them it has; -1 is none."""
    used: dict[LoadedAdapter, int] = {}
    adapter_of = []
    for sequence in sequences:
        adapter = sequence.request.adapter
        adapter_of.append(-1 if adapter is None else used.setdefault(adapter, len(used)))
    if not used:
        return (), None
    return tuple(adapter.weights for adapter in used), np.array(adapter_of, np.int32)


def _unknown(adapter: str) -> str:
    return f"no adapter {adapter!r:.80} is loaded: load it first, and name it by the id that this gives"
