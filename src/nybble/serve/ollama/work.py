"""Long work in threads of its own, so that it never takes those that answers need: what it tells, what it is sent."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from nybble.core.errors import ModelNotFoundError
from nybble.serve.errors import ApiError
from nybble.serve.openai.job import Chunks

Tell = Callable[[dict[str, Any]], None]
_Piece = bytes | Exception | None  # None: the end

MAX_JOBS = 8  # at once: pulls, creations and uploads
IDLE_SECONDS = 60.0  # an upload that stands still for so long is given up
_MAX_LINES = 256  # of progress that wait for a client that reads slowly
_MAX_PIECES = 4  # of an upload that wait for the disk
_POLL_SECONDS = 0.1
_FULL_SECONDS = 0.002


class _LeftError(Exception):
    """Nobody waits for the result any more: stop."""


class Workshop:
    """Runs jobs. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_JOBS, "nybble-models")
        self._busy = 0

    def _start(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Raises ApiError if too much is under way."""
        if self._busy >= MAX_JOBS:
            raise ApiError(503, f"{MAX_JOBS} models are being made or fetched: try again later")
        self._busy += 1
        loop = asyncio.get_running_loop()

        def done(future: Future[None]) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended before
                loop.call_soon_threadsafe(self._done)

        future = self._threads.submit(work)
        future.add_done_callback(done)
        wrapped = asyncio.wrap_future(future)
        wrapped.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # whoever left need not hear it
        return wrapped

    def _done(self) -> None:
        self._busy -= 1

    async def told(self, work: Callable[[Tell], None]) -> Chunks:
        """What a job tells, while it works. When nobody listens any more, the next thing that it tells ends it.

        Raises:
            ApiError: there is no such model, or too much is under way.
            Exception: whatever else the job raises.
        """
        loop = asyncio.get_running_loop()
        lines: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        room = threading.Semaphore(_MAX_LINES)
        left = threading.Event()

        def tell(line: dict[str, Any]) -> None:
            while not room.acquire(timeout=_POLL_SECONDS):
                if left.is_set():
                    break
            if left.is_set():
                raise _LeftError
            loop.call_soon_threadsafe(lines.put_nowait, line)

        def run() -> None:
            try:
                work(tell)
            except ModelNotFoundError as error:
                raise ApiError(404, str(error)) from None
            finally:
                if not left.is_set():
                    loop.call_soon_threadsafe(lines.put_nowait, None)

        working = self._start(run)
        try:
            while (line := await lines.get()) is not None:
                room.release()
                yield line
            await working
        finally:
            left.set()

    async def sent(self, pieces: AsyncIterator[bytes], take: Callable[[Iterator[bytes]], None]) -> None:
        """Give what comes over the network to a job that takes it, a few pieces ahead of it at most.

        Raises:
            ApiError: nothing came for a while, or too much is under way.
            Exception: whatever the job or the network raises; the job then has ended.
        """
        waiting: queue.Queue[_Piece] = queue.Queue(_MAX_PIECES)
        taking = self._start(lambda: take(_taken(waiting)))
        try:
            while (piece := await _next(pieces)) is not None:
                if piece and not await _put(waiting, piece, taking):
                    break
            else:
                await _put(waiting, None, taking)
        except BaseException:
            await asyncio.shield(_give_up(waiting, taking))
            raise
        await taking


async def _next(pieces: AsyncIterator[bytes]) -> bytes | None:
    try:
        async with asyncio.timeout(IDLE_SECONDS):
            return await anext(pieces, None)
    except TimeoutError:
        raise ApiError(408, f"nothing came for {IDLE_SECONDS:g} seconds") from None


def _taken(waiting: queue.Queue[_Piece]) -> Iterator[bytes]:
    while (piece := waiting.get()) is not None:
        if isinstance(piece, Exception):
            raise piece
        yield piece


async def _put(waiting: queue.Queue[_Piece], piece: _Piece, taking: asyncio.Future[None]) -> bool:
    """False if the job has ended: the disk is full."""
    while not taking.done():
        try:
            waiting.put_nowait(piece)
            return True
        except queue.Full:
            await asyncio.sleep(_FULL_SECONDS)
    return False


async def _give_up(waiting: queue.Queue[_Piece], taking: asyncio.Future[None]) -> None:
    await _put(waiting, _LeftError(), taking)
    with contextlib.suppress(Exception):
        await taking
