"""`nybble serve`: one model, or all that have a name on this machine, over HTTP."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from nybble.cli.named import speculation, stored_model
from nybble.cli.options import (
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    EagerOption,
    GpuMemoryOption,
    KvCacheTypeOption,
    PrefixCacheFileOption,
    PrefixCacheSizeOption,
    SpeculateOption,
    TensorParallelOption,
    ThreadsOption,
    draft_weights,
    local_path,
    prefix_cache,
)
from nybble.core.errors import ConfigError
from nybble.engine.async_engine import AsyncEngine
from nybble.engine.options import EngineOptions, free_memory, parse_bytes, parse_kv_type
from nybble.engine.roofline import Roofline, measure_roofline
from nybble.engine.speculation.mode import parse_mode
from nybble.serve.app import create_app
from nybble.serve.errors import ApiError
from nybble.serve.lifecycle import bind
from nybble.serve.lifecycle import serve as answer_requests
from nybble.serve.loading import Loader, adapter_of, modelfile_options, size_of
from nybble.serve.models import Models, name_key
from nybble.serve.ollama.options import keep_alive_seconds
from nybble.serve.preset import use_template
from nybble.serve.settings import ServeSettings
from nybble.store import Library
from nybble.store.create import Quantize

OLLAMA_PORT = 11434
_SHARE_OF_FREE_MEMORY = 0.8

logger = logging.getLogger(__name__)


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A GGUF file, a Hugging Face folder, or a name. Without it: every model of `nybble list`, loaded "
            "when it is asked for.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    ollama: Annotated[bool, typer.Option("--ollama", help="Listen on port 11434 too, where Ollama would.")] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="NYBBLE_API_KEY", help="Clients must send it. Better in the environment.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The name that clients ask for.")] = None,
    ctx: Annotated[int | None, typer.Option(min=1, help="The longest request, in tokens.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 64,
    kv_cache_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory of the cache, like 4GiB; by default half of what is free, or two full contexts of each of "
            "several models."
        ),
    ] = None,
    model_memory: Annotated[
        str | None,
        typer.Option(help="Memory of all models together, like 16GiB; by default 80 % of what is free."),
    ] = None,
    keep_alive: Annotated[
        str,
        typer.Option(
            envvar="NYBBLE_KEEP_ALIVE", help="How long an idle model stays in memory, like 5m or 30s; -1 for ever."
        ),
    ] = "5m",
    threads: ThreadsOption = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait or run.")] = 256,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running answers get when the server is told to stop.")
    ] = 30.0,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="A web page's origin that may ask (CORS); may be repeated.")
    ] = None,
    kv_cache_type: KvCacheTypeOption = "f16",
    speculate: SpeculateOption = None,
    prefix_caching: Annotated[bool, typer.Option(help="Reuse what equal beginnings of prompts have computed.")] = True,
    prefix_cache_file: PrefixCacheFileOption = "off",
    prefix_cache_size: PrefixCacheSizeOption = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="A LoRA of MODEL that is a model of its own, with this name; may be repeated.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    tensor_parallel_size: TensorParallelOption = 1,
    gpu_memory_utilization: GpuMemoryOption = None,
    enforce_eager: EagerOption = False,
    device_map: DeviceMapOption = None,
) -> None:
    """Serve models over the HTTP APIs of OpenAI, Ollama and TGI."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Before a model is loaded or fetched, so that what is wrong is said at once.
    listening = [bind(host, port)]
    if ollama:
        listening.append(bind(host, OLLAMA_PORT, hint="stop what listens there, or leave out --ollama"))
    if speculate is not None:
        parse_mode(speculate)
    seconds = _seconds(keep_alive)
    adapters = _named_adapters(lora or [])
    kept = prefix_cache(prefix_cache_file, prefix_cache_size)
    options = EngineOptions(
        max_model_len=ctx,
        max_num_seqs=max_num_seqs,
        kv_cache_memory=None if kv_cache_memory is None else parse_bytes(kv_cache_memory),
        enable_prefix_caching=prefix_caching,
        kv_cache_type=parse_kv_type(kv_cache_type),
        threads=threads,
        prefix_cache_file=kept.file,
        prefix_cache_size=kept.size,
        device=device if model is not None or device != "auto" else "cpu",
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=enforce_eager,
        device_map=device_map,
    )
    where = options.resolved_device()
    if model is None and where != "cpu":
        raise ConfigError("several models share the CPU's memory: name one MODEL to serve it with --device " + device)
    settings = ServeSettings(
        model_name=served_model_name or "",
        host=host,
        api_key=api_key,
        allowed_origins=tuple(allowed_origin or ()),
        max_queue=max_queue,
        drain_timeout=drain_timeout,
    )
    # Before the weights take their memory. It is the native backend's limit.
    roofline = measure_roofline(threads) if where == "cpu" else None
    if model is None:
        if served_model_name is not None:
            raise ConfigError("--served-model-name names one model: give that model, or leave the option out")
        if adapters:
            raise ConfigError("--lora is for a server with a MODEL: with a line ADAPTER, `nybble create` makes one")
        if isinstance(kept.file, Path):
            raise ConfigError("--prefix-cache-file names the file of one MODEL: with `on` each model has its own")
        models = _many(options, settings, roofline, speculate, model_memory, seconds)
        what = f"every model of `nybble list` ({len(Library().list())} now)"
    else:
        if model_memory is not None:
            raise ConfigError("--model-memory is for a server without a MODEL: one model has --kv-cache-memory")
        models = _one(model, options, settings, roofline, speculate, adapters)
        settings = models.settings
        what = " and ".join([settings.model_name, *adapters])
    ports = [one.getsockname()[1] for one in listening]
    addresses = [f"http://{f'[{host}]' if ':' in host else host}:{port}" for port in ports]
    places = f"{addresses[0]}/v1" + (f" and, as Ollama would be, at {addresses[1]}" if ollama else "")
    answer_requests(
        create_app(models, settings, quantizer=_quantizer),
        listening,
        settings,
        lambda: print(f"{what} {'are' if adapters else 'is'} served at {places}", file=sys.stderr, flush=True),
    )


def _named_adapters(given: list[str]) -> dict[str, Path]:
    """The paths of adapters by the names that clients ask for. Raises ConfigError if they cannot be understood."""
    adapters: dict[str, Path] = {}
    for one in given:
        name, _, path = one.partition("=")
        if not name.strip() or not path:
            raise ConfigError(f"--lora takes NAME=PATH, not {one!r:.200}")
        if name_key(name) in map(name_key, adapters):
            raise ConfigError(f"--lora gives the name {name!r:.200} twice")
        if not Path(path).exists():
            raise ConfigError(f"--lora: there is no adapter at {path}")
        adapters[name] = Path(path)
    return adapters


def _one(
    model: str,
    options: EngineOptions,
    settings: ServeSettings,
    roofline: Roofline | None,
    speculate: str | None,
    adapters: dict[str, Path],
) -> Models:
    """The model and its adapters, loaded. What a Modelfile says counts where the options say nothing."""
    path = local_path(model)
    stored = stored_model(model)
    mode = speculation(stored.parameters if stored is not None else {}, speculate)
    name = settings.model_name or (model if not os.path.exists(model) else path.stem)
    if name_key(name) in map(name_key, adapters):
        raise ConfigError(f"--lora gives the name {name!r:.200} to an adapter, and the model itself is called so")
    if stored is not None:
        options = modelfile_options(options, stored)
    own = None if stored is None else adapter_of(stored)
    with draft_weights(mode, path, threads=options.threads) as draft:
        options = replace(options, speculate=mode, draft=draft)
        engine = AsyncEngine.from_model(path, options=options, model_name=name)
    if stored is not None:
        use_template(engine, stored)
    size = size_of(engine, path, options.kv_cache_type)
    return Models.of_one(
        engine,
        replace(settings, model_name=name),
        roofline,
        stored,
        size,
        adapter=None if own is None else asyncio.run(engine.load_adapter(own)),
        adapters={other: asyncio.run(engine.load_adapter(one)) for other, one in adapters.items()},
    )


def _many(
    options: EngineOptions,
    settings: ServeSettings,
    roofline: Roofline | None,
    speculate: str | None,
    model_memory: str | None,
    keep_alive: float,
) -> Models:
    """Every model of the store, to be loaded when it is asked for."""
    memory = int(free_memory() * _SHARE_OF_FREE_MEMORY) if model_memory is None else parse_bytes(model_memory)
    origin = "80 % of what is free" if model_memory is None else "--model-memory"
    logger.info("models may take %.2f GB of memory together (%s)", memory / 1e9, origin)

    def drafts(mode: str, target: Path) -> AbstractContextManager[Path | None]:
        return draft_weights(mode, target, threads=options.threads)

    loader = Loader(options, lambda stored: speculation(stored.parameters, speculate), drafts)
    return Models(settings, library=Library(), loader=loader, memory=memory, keep_alive=keep_alive, roofline=roofline)


def _seconds(keep_alive: str) -> float:
    """Raises ConfigError if it is no length of time."""
    try:
        return keep_alive_seconds(keep_alive)
    except ApiError as error:
        raise ConfigError(f"--keep-alive: {error.message}") from None


def _quantizer(to: str) -> Quantize:
    """What writes weights in a GGUF type, for /api/create."""
    # What quantises takes longer to import than a model to load.
    made: Quantize = importlib.import_module("nybble.cli.create").quantizer(to)
    return made
