"""What all routes that generate share: admission, running a request, and hearing that its client has left."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from nybble.core.outputs import RequestOutput
from nybble.core.sampling import SamplingParams
from nybble.engine.async_engine import AsyncEngine
from nybble.serve.admission import Admission
from nybble.serve.errors import ApiError, as_api_error, error_body
from nybble.serve.metrics import Metrics
from nybble.serve.settings import ServeSettings

T = TypeVar("T")

_DISCONNECT_POLL_SECONDS = 0.1


@dataclass(slots=True)
class Server:
    """What the routes work with."""

    engine: AsyncEngine
    settings: ServeSettings
    admission: Admission
    metrics: Metrics
    started: int

    def check_model(self, name: str) -> None:
        """Raises ApiError if another model is asked for."""
        if name != self.settings.model_name:
            raise ApiError(
                404,
                f"the model {name!r} does not exist; this server has {self.settings.model_name!r}",
                param="model",
                code="model_not_found",
            )

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
            prompt, params, new_id("req"), prompt=text, priority=priority or 0, cache_salt=cache_salt
        )
        try:
            async with aclosing(stream):
                async for last in stream:
                    num_tokens += sum(len(sample.token_ids) for sample in last.outputs)
                    if last.error is not None:
                        raise ApiError(500, f"the request failed: {last.error}")
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


async def events(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    """Chunks as server-sent events; an error becomes the last one."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield event(chunk)
    except Exception as error:
        told = as_api_error(error)
        yield event(error_body(told.status, told.message, param=told.param, code=told.code))
    yield DONE


async def first_or_raise(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[dict[str, Any], None]:
    """The same chunks, with the first one here already: an error before it is still an answer with a status."""
    first = await anext(chunks)

    async def all_of_them() -> AsyncGenerator[dict[str, Any], None]:
        async with aclosing(chunks):
            yield first
            async for chunk in chunks:
                yield chunk

    return all_of_them()


def usage(num_prompt_tokens: int, num_new_tokens: int, num_cached_tokens: int | None) -> dict[str, Any]:
    """What a request took."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens or 0},
    }
