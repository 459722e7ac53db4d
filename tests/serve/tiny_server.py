"""A real server over a small real model, on a free port of the loopback interface."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from nybble.engine.async_engine import AsyncEngine
from nybble.engine.options import EngineOptions
from nybble.serve.app import create_app
from nybble.serve.lifecycle import bind
from nybble.serve.settings import ServeSettings


@dataclass
class Running:
    """A server that answers."""

    url: str
    engine: AsyncEngine


@contextmanager
def running(folder: Path, **settings: object) -> Iterator[Running]:
    options = EngineOptions(max_model_len=192, kv_cache_memory="16MiB", max_num_seqs=8, threads=2)
    engine = AsyncEngine.from_model(folder, options=options, model_name="tiny")
    listening = bind("127.0.0.1", 0)
    app = create_app(engine, ServeSettings(model_name="tiny", **settings))  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", engine)
    finally:
        server.should_exit = True
        thread.join()
        engine._stopping = True
        with engine._wake:
            engine._wake.notify()
        engine._thread.join()
