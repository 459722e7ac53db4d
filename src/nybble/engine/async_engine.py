"""The engine for a server: EngineCore in a thread of its own, requests as asynchronous iterators."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nybble.core.errors import ConfigError
from nybble.core.outputs import RequestOutput
from nybble.core.sampling import RequestOutputKind, SamplingParams
from nybble.engine.adapters import LoadedAdapter
from nybble.engine.core import EngineCore, EngineStats
from nybble.engine.embedding import unit_vector
from nybble.engine.load import LoadedModel
from nybble.engine.options import EngineOptions
from nybble.engine.request import Pooling
from nybble.engine.start import start_engine
from nybble.tokenizer import ChatTemplate, Tokenizer
from nybble.tokenizer.chat_prompt import Template

logger = logging.getLogger(__name__)

_DRAIN_POLL_SECONDS = 0.02


class EngineDeadError(RuntimeError):
    """The engine's thread has ended; nothing more can be answered."""


class _Stream:
    """The outputs of one request, on their way to the event loop that waits for them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.queue: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()


class AsyncEngine:
    """Answers many requests at once. All methods but the constructors belong to an event loop."""

    def __init__(self, core: EngineCore, loaded: LoadedModel, model_name: str) -> None:
        self.model_name = model_name
        self.context = core.context
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.eos_token_ids = core.eos_token_ids
        self.chat_template: Template | None = _chat_template(loaded)
        self.chat_template_source = loaded.checkpoint.chat_template
        # What a conversation begins with if its template does not write it.
        self.prompt_bos_token_id = loaded.checkpoint.bos_token_id if loaded.checkpoint.add_bos else None
        self._core = core
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._streams: dict[str, _Stream] = {}
        self._stopping = False
        self._dead: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="nybble-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_model(
        cls, model: str | Path, *, options: EngineOptions | None = None, model_name: str | None = None
    ) -> AsyncEngine:
        """Load a model from a path. Takes a while: call it in a thread.

        Raises:
            CheckpointError, TokenizerError, ConfigError: as `start_engine` does.
        """
        loaded, core = start_engine(Path(model), options or EngineOptions())
        return cls(core, loaded, model_name or Path(model).stem)

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str,
        *,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """What a request gives, as its output_kind says. Closing the iterator ends the request.

        adapter: what `load_adapter` gave.

        Raises:
            PromptError, ConfigError: the request cannot be served; nothing was queued.
            EngineDeadError: the engine has ended.
        """
        prepared = await asyncio.to_thread(
            self._core.make_request,
            request_id,
            list(prompt_token_ids),
            params,
            prompt=prompt,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
        )
        stream = self._open(request_id)
        self._command(lambda: self._core.add_request(prepared))
        finished = False
        try:
            while not finished:
                output = await stream.queue.get()
                if isinstance(output, Exception):
                    finished = True
                    raise output
                finished = output.finished
                yield output
        finally:
            self._streams.pop(request_id, None)
            if not finished:
                self._command(lambda: self._core.abort(request_id))

    async def embed(
        self,
        prompt_token_ids: Sequence[int],
        request_id: str,
        *,
        pooling: Pooling | None = None,
        adapter: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """The vector of a text, [hidden_size] of length 1: the last hidden states' mean, or the last token's.

        Raises:
            PromptError, ConfigError: the text cannot be read; nothing was queued.
            EngineDeadError: the engine has ended.
        """
        prepared = await asyncio.to_thread(
            self._core.make_request,
            request_id,
            list(prompt_token_ids),
            SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY),  # a long text is read in pieces
            pooling=pooling or "mean",
            adapter=adapter,
        )
        stream = self._open(request_id)
        self._command(lambda: self._core.add_request(prepared))
        finished = False
        try:
            output = await stream.queue.get()
            finished = True
            if isinstance(output, Exception):
                raise output
            return unit_vector(prepared, output.error)
        finally:
            self._streams.pop(request_id, None)
            if not finished:
                self._command(lambda: self._core.abort(request_id))

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator gives a last output with finish_reason "abort"."""
        self._command(lambda: self._core.abort(request_id))

    async def load_adapter(self, path: str | Path) -> str:
        """Make a LoRA ready while answers go on; the id to name it by. The same adapter is loaded once.

        Raises:
            ModelNotFoundError, CheckpointError, ConfigError: as `EngineCore.load_adapter` does.
        """
        return await asyncio.to_thread(self._core.load_adapter, path)

    def unload_adapter(self, adapter: str) -> None:
        """Let go of an adapter. Requests that have it go on with it. Raises ConfigError if it is not loaded."""
        self._core.unload_adapter(adapter)

    def adapters(self) -> tuple[LoadedAdapter, ...]:
        """The adapters that requests may name, in the order in which they were loaded."""
        return self._core.adapters.all()

    def stats(self) -> EngineStats:
        """The engine's figures at some moment nearby."""
        return self._core.stats()

    def is_healthy(self) -> bool:
        """Whether requests can be answered."""
        return self._dead is None and self._thread.is_alive()

    async def shutdown(self, *, drain_timeout: float | None) -> None:
        """Stop: after what runs has ended, or after so many seconds; None stops at once. Waits for the thread."""
        if drain_timeout is not None:
            deadline = asyncio.get_running_loop().time() + drain_timeout
            while self._streams and self.is_healthy() and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(_DRAIN_POLL_SECONDS)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._core.close)

    # ---- between the event loop and the engine's thread ----

    def _open(self, request_id: str) -> _Stream:
        if not self.is_healthy() or self._stopping:
            raise EngineDeadError("the engine has ended" if self._dead is None else f"the engine failed: {self._dead}")
        if request_id in self._streams:
            raise ConfigError(f"a request with the id {request_id!r} is already under way")
        stream = self._streams[request_id] = _Stream(asyncio.get_running_loop())
        return stream

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        """The engine's thread."""
        try:
            while self._wait_for_work():
                while self._commands:
                    self._commands.popleft()()
                self._deliver(self._core.step())
            self._close(EngineDeadError("the engine was shut down"))
        except BaseException as error:
            self._dead = error
            logger.exception("the engine failed")
            self._close(EngineDeadError(f"the engine failed: {error}"))

    def _wait_for_work(self) -> bool:
        """False when it is time to stop."""
        with self._wake:
            while not (self._stopping or self._commands or self._core.has_unfinished_requests):
                self._wake.wait()
            return not self._stopping

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """One call into each event loop, whatever the number of requests."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput | Exception]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                batches.setdefault(stream.loop, []).append((stream, output))
        for loop, batch in batches.items():
            _call(loop, batch)

    def _close(self, error: Exception) -> None:
        for stream in list(self._streams.values()):
            _call(stream.loop, [(stream, error)])


def _call(loop: asyncio.AbstractEventLoop, batch: list[tuple[_Stream, RequestOutput | Exception]]) -> None:
    def put() -> None:
        for stream, item in batch:
            stream.queue.put_nowait(item)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:  # the loop is closed: nobody waits any more
        logger.debug("an event loop ended before its requests")


def _chat_template(loaded: LoadedModel) -> ChatTemplate | None:
    source = loaded.checkpoint.chat_template
    if source is None:
        return None
    tokenizer = loaded.tokenizer
    return ChatTemplate(source, bos_token=tokenizer.bos_token or "", eos_token=tokenizer.eos_token or "")
