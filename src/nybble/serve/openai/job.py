"""What all routes that generate share: admission, running a request, and hearing that its client has left."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nybble.core.outputs import RequestOutput
from nybble.core.sampling import SamplingParams
from nybble.engine.async_engine import AsyncEngine
from nybble.serve.admission import Admission
from nybble.serve.errors import ApiError, as_api_error, error_body
from nybble.serve.metrics import ModelMetrics
from nybble.serve.preset import Preset
from nybble.serve.settings import ServeSettings

T = TypeVar("T")

_DISCONNECT_POLL_SECONDS = 0.1


@dataclass(slots=True)
class Server:
    """What the routes work with: one model, and what it shares with others.

    adapter: the engine's id of the model's LoRA.
    """

    engine: AsyncEngine
    settings: ServeSettings
    admission: Admission
    metrics: ModelMetrics
    started: int  # seconds since 1970
    preset: Preset = field(default_factory=Preset)
    adapter: str | None = None

    def cost(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """The most tokens that a request can take."""
        longest = self.engine.context - num_prompt_tokens if params.max_tokens is None else params.max_tokens
        return num_prompt_tokens + max(longest, 0) * params.n

    async def run(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        text: str | None = None,
        priority: int | None = None,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one request. Closing it ends the request.

        Raises:
            ApiError: the request cannot be served, or failed.
        """
        num_tokens = 0
        last: RequestOutput | None = None
        stream = self.engine.generate(
            prompt,
            params,
            new_id("req"),
            prompt=text,
            priority=priority or 0,
            cache_salt=cache_salt,
            adapter=self.adapter,
        )
        try:
            async with aclosing(stream):
                async for last in stream:
                    num_tokens += sum(len(sample.token_ids) for sample in last.outputs)
                    if last.error is not None:
                        raise ApiError(400 if last.is_refused else 500, f"the request failed: {last.error}")
                    yield last
        finally:
            if last is not None:
                self.metrics.finished(last, num_tokens)


def new_id(kind: str) -> str:
    """An id that nobody can guess."""
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    return int(time.time())


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ApiError: the client has left (nobody reads it).
    """
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=_DISCONNECT_POLL_SECONDS)
            if done:
                return task.result()
            if await request.is_disconnected():
                raise ApiError(499, "the client has left")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def all_of(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, at once; the first error ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


Chunks = AsyncGenerator[dict[str, Any], None]


async def event_stream(request: Request, chunks: Chunks, admitted: ExitStack) -> Response:
    """Chunks as an answer of server-sent events, which keeps what `admitted` holds until it ends.

    Raises:
        Exception: whatever comes before the first chunk, so that it is still an answer with a status of its own.
    """
    first = await unless_disconnected(request, anext(chunks))
    return ChunkStream(_events(first, chunks), chunks, admitted.pop_all(), media_type="text/event-stream")


class ChunkStream(StreamingResponse):
    """An answer that is written from chunks. When it ends, or its client leaves, they are closed and room is made."""

    def __init__(
        self,
        content: AsyncGenerator[bytes, None],
        chunks: Chunks,
        admitted: ExitStack,
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(content, media_type=media_type, headers=headers)
        self._chunks = chunks
        self._admitted = admitted
        self._held = AsyncExitStack()

    def hold(self, held: AsyncExitStack) -> None:
        """Close this too when the answer has been sent."""
        self._held.push_async_callback(held.aclose)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Here and not in the generator, which never begins if the client has left already.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._admitted.close()
            try:
                await self._chunks.aclose()
            finally:
                await self._held.aclose()


async def _events(first: dict[str, Any], chunks: Chunks) -> AsyncGenerator[bytes, None]:
    yield event(first)
    try:
        async for chunk in chunks:
            yield event(chunk)
    except Exception as error:  # too late for a status: it is the last event
        told = as_api_error(error)
        yield event(error_body(told.status, told.message, param=told.param, code=told.code))
    yield DONE


@dataclass(slots=True)
class Effort:
    """What the engine was spared in a request, as its outputs tell."""

    num_cached_tokens: int = 0
    num_guesses: int = 0
    num_right_guesses: int = 0

    def see(self, output: RequestOutput) -> None:
        """The latest output counts."""
        self.num_cached_tokens = output.num_cached_tokens or 0
        if output.metrics is not None:
            self.num_guesses = output.metrics.num_guesses
            self.num_right_guesses = output.metrics.num_right_guesses


def usage(num_prompt_tokens: int, num_new_tokens: int, efforts: Sequence[Effort]) -> dict[str, Any]:
    """What one or several requests took. Guesses of speculation are "predictions" in OpenAI's words."""
    right = sum(effort.num_right_guesses for effort in efforts)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(effort.num_cached_tokens for effort in efforts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": right,
            "rejected_prediction_tokens": sum(effort.num_guesses for effort in efforts) - right,
        },
    }
