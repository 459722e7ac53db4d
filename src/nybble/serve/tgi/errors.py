"""Errors as TGI's clients read them: `{"error", "error_type"}`, with TGI's statuses."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nybble.engine.async_engine import EngineDeadError
from nybble.serve.bodies import JsonRoute
from nybble.serve.errors import ApiError, as_api_error, described


class IncompleteError(ApiError):
    """An answer ended before it was complete: the server stops."""

    def __init__(self) -> None:
        super().__init__(500, "the answer ended before it was complete: the server is shutting down")


def told(error: Exception) -> tuple[int, str, str]:
    """Status, sentence and type of an error."""
    if isinstance(error, RequestValidationError):
        return 422, described(error)[1], "validation"
    if isinstance(error, HTTPException):
        return error.status_code if error.status_code != 400 else 422, str(error.detail), "validation"
    if isinstance(error, IncompleteError):
        return 500, error.message, "incomplete_generation"
    if isinstance(error, EngineDeadError):
        return 424, str(error), "generation"
    known = as_api_error(error)
    if known.status in (429, 503):
        return known.status, known.message, "overloaded"
    if known.status >= 500:
        return 424, known.message, "generation"
    return 422 if known.status in (400, 404) else known.status, known.message, "validation"


def error_body(error: Exception) -> dict[str, str]:
    """The JSON of an error."""
    _, message, kind = told(error)
    return {"error": message, "error_type": kind}


async def answered(work: Awaitable[Response]) -> Response:
    """The answer, or the error as TGI tells it."""
    try:
        return await work
    except Exception as error:  # one that nobody expected is logged by `as_api_error`
        return _response(error)


def _response(error: Exception) -> Response:
    status, message, kind = told(error)
    headers = error.headers if isinstance(error, ApiError) else None
    # In ASCII, because a message may quote what is not Unicode.
    content = json.dumps({"error": message, "error_type": kind})
    return Response(content, status, headers=headers, media_type="application/json")


class TgiRoute(JsonRoute):
    """A route whose errors have TGI's shape."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def shaped(request: Request) -> Response:
            return await answered(handler(request))

        return shaped
