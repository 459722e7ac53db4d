"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nybble.core.errors import NybbleError
from nybble.core.sampling import SamplingParams
from nybble.engine.async_engine import EngineDeadError

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error: status, one sentence, and which field is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """The answer that says so."""
    body = error_body(status, message, param=param, code=code)
    # In ASCII, because a message may quote what is not Unicode.
    return Response(json.dumps(body), status, headers=headers, media_type="application/json")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NybbleError):
        code = "context_length_exceeded" if "context holds" in str(error) else None
        # Messages about a parameter begin with its name.
        name = (str(error).split() or [""])[0]
        param = name if name in SamplingParams.__dataclass_fields__ else None
        return ApiError(400, str(error), code=code, param=param)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), headers={"Retry-After": "5"})
    logger.exception("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why")


def described(error: RequestValidationError) -> tuple[str | None, str]:
    """Which field of a body is to blame, and why."""
    if isinstance(error.body, bytes):
        return None, "the body must be JSON: send it with the header Content-Type: application/json"
    found = [(_path(problem["loc"], error.body), problem) for problem in error.errors()]
    # A value that may have several types has an error for each: the one that understood most of it says it best.
    path, first = max(found, key=lambda one: len(one[0]))
    where = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        return where, f"{where} is not supported"
    if first["type"] == "json_invalid":
        return None, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}"
    reasons = dict.fromkeys(problem["msg"] for other, problem in found if other == path)
    return where, f"{where or 'the body'}: {'; or '.join(reasons)}"


def _path(location: tuple[Any, ...], body: Any) -> list[str]:
    """The names of fields in a location, without those of the types that were tried."""
    path = []
    for place, part in enumerate(location):
        if part == "body" and place == 0:
            continue
        if (isinstance(body, dict) and part in body) or (
            isinstance(body, list) and isinstance(part, int) and part < len(body)
        ):
            body = body[part]
        elif not (isinstance(body, dict) and place == len(location) - 1 and place > 0):
            continue  # a type; but the last name of all, if it is not there, is that of a missing field
        path.append(str(part))
    return path


def add_error_handlers(app: FastAPI) -> None:
    """Every error leaves in the same shape."""

    async def on_error(request: Request, error: Exception) -> Response:
        told = as_api_error(error)
        return error_response(told.status, told.message, param=told.param, code=told.code, headers=told.headers)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        param, message = described(error)
        return error_response(400, message, param=param)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {
            404: f"there is no {request.url.path} here",
            405: f"{request.url.path} does not take {request.method}",
        }.get(error.status_code, str(error.detail))
        return error_response(error.status_code, message, headers=dict(error.headers or {}))

    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    for kind in (ApiError, NybbleError, EngineDeadError, Exception):
        app.add_exception_handler(kind, on_error)
