"""`nybble serve`: a model as an HTTP endpoint."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from nybble.cli.named import speculation, stored_model
from nybble.cli.options import (
    KvCacheTypeOption,
    ModelArgument,
    SpeculateOption,
    ThreadsOption,
    draft_weights,
    local_path,
)
from nybble.engine.async_engine import AsyncEngine
from nybble.engine.options import EngineOptions, parse_kv_type
from nybble.engine.roofline import measure_roofline
from nybble.engine.speculation.mode import parse_mode
from nybble.serve.app import create_app
from nybble.serve.lifecycle import bind
from nybble.serve.lifecycle import serve as answer_requests
from nybble.serve.settings import ServeSettings


def serve(
    model: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="NYBBLE_API_KEY", help="Clients must send it. Better in the environment.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The name that clients ask for.")] = None,
    ctx: Annotated[int | None, typer.Option(min=1, help="The longest request, in tokens.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 64,
    kv_cache_memory: Annotated[
        str | None, typer.Option(help="Memory of the cache, like 4GiB; by default half of what is free.")
    ] = None,
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
) -> None:
    """Serve a model over OpenAI's HTTP API."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    listening = bind(host, port)  # before the model is loaded: a port that is taken says so at once
    if speculate is not None:
        parse_mode(speculate)  # a wrong one says so before a model is fetched
    path = local_path(model)
    stored = stored_model(model)
    mode = speculation(stored.parameters if stored is not None else {}, speculate)
    name = served_model_name or (model if not os.path.exists(model) else path.stem)
    roofline = measure_roofline(threads)  # before the weights take their memory
    with draft_weights(mode, path, threads=threads) as draft:
        options = EngineOptions(
            max_model_len=ctx,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(512, max_num_seqs),
            kv_cache_memory=kv_cache_memory,
            enable_prefix_caching=prefix_caching,
            kv_cache_type=parse_kv_type(kv_cache_type),
            speculate=mode,
            draft=draft,
            threads=threads,
        )
        engine = AsyncEngine.from_model(path, options=options, model_name=name)
    settings = ServeSettings(
        model_name=name,
        host=host,
        api_key=api_key,
        allowed_origins=tuple(allowed_origin or ()),
        max_queue=max_queue,
        drain_timeout=drain_timeout,
    )
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    answer_requests(
        create_app(engine, settings, roofline),
        [listening],
        settings,
        lambda: print(f"{name} is served at {address}/v1", file=sys.stderr, flush=True),
    )
