"""Adapters as vLLM's users name them: loaded when they are first asked for, and kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from nybble.core.errors import ConfigError
from nybble.core.lora import LoRARequest
from nybble.engine.core import EngineCore


class LoraCache:
    """The adapters of an engine by their names. max_loras: how many stay; None: all.

    Raises:
        ConfigError: max_loras is not positive.
    """

    def __init__(self, core: EngineCore, *, max_loras: int | None) -> None:
        if max_loras is not None and max_loras < 1:
            raise ConfigError(f"max_loras must be at least 1, not {max_loras}")
        self._core = core
        self._max_loras = max_loras
        self._loaded: OrderedDict[str, str] = OrderedDict()  # path -> id, the least recently used first
        self._known: dict[str | int, LoRARequest] = {}  # by name, and by number

    def ids(self, requests: Sequence[LoRARequest | None]) -> list[str | None]:
        """The id of each adapter, all of them loaded.

        Raises:
            ConfigError: two adapters share a name or a number, or there are more of them than may stay.
            ModelNotFoundError, CheckpointError: as `EngineCore.load_adapter` does.
        """
        wanted = {str(Path(request.lora_path)): request for request in requests if request is not None}
        if self._max_loras is not None and len(wanted) > self._max_loras:
            raise ConfigError(f"{len(wanted)} adapters are asked for at once, and max_loras is {self._max_loras}")
        for path, request in wanted.items():
            self._check_name(request)
            if path not in self._loaded:
                self._loaded[path] = self._core.load_adapter(path)
            self._loaded.move_to_end(path)
            self._known[request.lora_name] = self._known[request.lora_int_id] = request
        while self._max_loras is not None and len(self._loaded) > self._max_loras:
            _, old = self._loaded.popitem(last=False)
            if old not in self._loaded.values():  # the same adapter under another path
                self._core.unload_adapter(old)
        return [None if request is None else self._loaded[str(Path(request.lora_path))] for request in requests]

    def _check_name(self, request: LoRARequest) -> None:
        for key in (request.lora_name, request.lora_int_id):
            known = self._known.get(key, request)
            if Path(known.lora_path) != Path(request.lora_path):
                raise ConfigError(
                    f"the adapters {known.lora_path} and {request.lora_path} are both called {request.lora_name!r} or "
                    f"have the number {request.lora_int_id}: give each its own"
                )
