"""How models of the store are loaded when somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from nybble.core.errors import ConfigError, StoreError
from nybble.engine.async_engine import AsyncEngine
from nybble.engine.needs import memory_needs
from nybble.engine.options import EngineOptions, KvCacheType, parse_bytes
from nybble.engine.scheduler import blocks_for
from nybble.serve.preset import use_template
from nybble.store import StoredModel

# Full contexts that the cache of a model holds if nobody says how large it may be: others want memory too.
_CACHED_CONTEXTS = 2

# The weights of the draft model that a way of speculation names, for the model at a path, while it is loaded.
Drafts = Callable[[str, Path], AbstractContextManager[Path | None]]


def _no_drafts(mode: str, target: Path) -> AbstractContextManager[Path | None]:
    return nullcontext(None)


@dataclass(frozen=True, slots=True)
class Loader:
    """Options that all models share; a Modelfile's num_ctx, num_thread and speculate count where they say nothing.

    speculation: from a Modelfile's parameters to the way of guessing.
    """

    options: EngineOptions = field(default_factory=EngineOptions)
    speculation: Callable[[StoredModel], str] = lambda stored: "auto"
    drafts: Drafts = _no_drafts

    def size(self, stored: StoredModel) -> int:
        """Bytes that the model will take, weights and cache.

        Raises:
            NybbleError: it cannot be loaded.
        """
        weights, cache = self._sizes(stored)
        return weights + cache

    def load(self, stored: StoredModel) -> AsyncEngine:
        """The model without its adapter, ready for requests. Takes a while: call it in a thread.

        Raises:
            NybbleError: it cannot be loaded.
        """
        mode = self.speculation(stored)
        with self.drafts(mode, stored.path) as draft:
            options = replace(
                modelfile_options(self.options, stored),
                kv_cache_memory=self._sizes(stored)[1],
                speculate=mode,
                draft=draft,
            )
            engine = AsyncEngine.from_model(stored.path, options=options, model_name=str(stored.name))
        use_template(engine, stored)
        return engine

    def _sizes(self, stored: StoredModel) -> tuple[int, int]:
        context = modelfile_options(self.options, stored).max_model_len
        needs = memory_needs(stored.path, context=context, kv_cache_type=self.options.kv_cache_type)
        if self.options.kv_cache_memory is not None:
            return needs.weights, parse_bytes(self.options.kv_cache_memory)
        return needs.weights, needs.cache * min(self.options.max_num_seqs, _CACHED_CONTEXTS)


def engine_key(stored: StoredModel) -> str:
    """Models with the same key can be answered by one engine: they differ in adapters and presets only.

    Raises:
        StoreError: the weights are not there.
    """
    try:
        status = stored.path.stat()
    except OSError as error:
        raise StoreError(f"{stored.path} cannot be read: {error.strerror or error}") from None
    loading = [stored.parameters.get(name) for name in ("num_ctx", "num_thread", "speculate", "draft_num_predict")]
    place = (str(stored.path), status.st_ino, status.st_size, status.st_mtime_ns)
    return repr((*place, stored.template, *loading))


def adapter_of(stored: StoredModel) -> Path | None:
    """The model's LoRA.

    Raises:
        ConfigError: it has several.
    """
    if len(stored.adapters) > 1:
        raise ConfigError(
            f"{stored.name} has {len(stored.adapters)} adapters, and one can be applied at a time: make it again with "
            "one line ADAPTER"
        )
    return next(iter(stored.adapters), None)


def adapter_size(path: Path) -> int:
    """Bytes of an adapter's files, which is about what it takes in memory.

    Raises:
        StoreError: they cannot be read.
    """
    try:
        files = [one for one in path.iterdir() if one.is_file()] if path.is_dir() else [path]
        return sum(one.stat().st_size for one in files)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from None


def modelfile_options(options: EngineOptions, stored: StoredModel) -> EngineOptions:
    """Options, with what the model's Modelfile says where they leave something open."""
    return replace(
        options,
        max_model_len=options.max_model_len or _number(stored, "num_ctx"),
        threads=options.threads or _number(stored, "num_thread"),
    )


def size_of(engine: AsyncEngine, path: Path, kv_cache_type: KvCacheType) -> int:
    """Bytes that a loaded model takes, weights and cache."""
    needs = memory_needs(path, context=engine.context, kv_cache_type=kv_cache_type)
    return needs.weights + needs.cache * engine.stats().num_blocks // blocks_for(engine.context)


def _number(stored: StoredModel, parameter: str) -> int | None:
    """A whole-number parameter, None where it is not set or 0."""
    value = stored.parameters.get(parameter)
    return value if isinstance(value, int) and value > 0 else None
