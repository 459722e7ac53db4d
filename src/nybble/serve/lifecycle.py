"""Running the server: its socket, its signals, and a shutdown that lets answers finish."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from nybble.core.errors import ConfigError
from nybble.serve.admission import Admission
from nybble.serve.models import Models
from nybble.serve.settings import ServeSettings

logger = logging.getLogger(__name__)


def bind(host: str, port: int, *, hint: str = "choose another --port") -> socket.socket:
    """A listening socket; port 0 takes a free one. hint: what to do if it is taken.

    Raises:
        ConfigError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen(1024)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"cannot listen on {host} port {port}: {why}; {hint}") from None
    return listening


def serve(app: FastAPI, listening: Sequence[socket.socket], settings: ServeSettings, ready: Callable[[], None]) -> None:
    """Answer until SIGTERM or Ctrl-C. The first one lets what runs finish, the second one ends it."""
    asyncio.run(_serve(app, listening, settings, ready))


async def _serve(
    app: FastAPI, listening: Sequence[socket.socket], settings: ServeSettings, ready: Callable[[], None]
) -> None:
    models: Models = app.state.models
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(settings.drain_timeout) + 1,
        lifespan="off",
    )
    http = _Http(config)
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    again = asyncio.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe((again if asked.is_set() else asked).set)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    running = asyncio.create_task(http.serve(sockets=list(listening)))
    try:
        while not http.started and not running.done():
            await asyncio.sleep(0.01)
        ready()
        await asyncio.wait({running, asyncio.create_task(asked.wait())}, return_when=asyncio.FIRST_COMPLETED)
        models.admission.is_open = False  # not ready from here on
        await _drain(models.admission, settings.drain_timeout, again)
    finally:
        await models.shutdown(None)
        http.should_exit = True
        if again.is_set():
            http.force_exit = True
        await running
        for number, handler in before.items():
            signal.signal(number, handler)


async def _drain(admission: Admission, timeout: float, again: asyncio.Event) -> None:
    """Until everything has been answered, the time is over, or a second signal came."""
    deadline = asyncio.get_running_loop().time() + timeout
    while admission.num_requests and not again.is_set():
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            logger.warning("%d requests are ended: the drain timeout is over", admission.num_requests)
            return
        await asyncio.sleep(min(0.05, left))


class _Http(uvicorn.Server):
    """Signals are ours."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield
