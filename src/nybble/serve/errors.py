"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nybble.core.errors import NybbleError
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
) -> JSONResponse:
    """The answer that says so."""
    return JSONResponse(error_body(status, message, param=param, code=code), status, headers=headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an error of the engine."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, NybbleError):
        code = "context_length_exceeded" if "context holds" in str(error) else None
        return ApiError(400, str(error), code=code)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), headers={"Retry-After": "5"})
    logger.exception("a request failed", exc_info=error)
    return ApiError(500, "the server failed on this request; its log says why")


def add_error_handlers(app: FastAPI) -> None:
    """Every error leaves in the same shape."""

    async def on_error(request: Request, error: Exception) -> JSONResponse:
        told = as_api_error(error)
        return error_response(told.status, told.message, param=told.param, code=told.code, headers=told.headers)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query")) or None
        if first["type"] == "extra_forbidden":
            message = f"{where} is not supported"
        elif first["type"] == "json_invalid":
            message = f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}"
        else:
            message = f"{where or 'the body'}: {first['msg']}"
        return error_response(400, message, param=where)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
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
