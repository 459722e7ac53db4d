"""Reading bodies: how deep they may nest, and how much text a prompt may be."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response

from nybble.serve.errors import ApiError

MAX_DEPTH = 64
# On average. Text that is longer than this cannot be meant for the context, and to encode it takes time.
MAX_CHARS_PER_TOKEN = 32

_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_HALVES = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class JsonRoute(APIRoute):
    """A route whose body may not nest deeply, and is Unicode throughout."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def checked(request: Request) -> Response:
            return await handler(_Checked(request.scope, request.receive))

        return checked


class _Checked(Request):
    async def json(self) -> Any:
        if nesting(await self.body()) > MAX_DEPTH:
            raise HTTPException(400, f"the body is nested more than {MAX_DEPTH} levels deep")
        value = await super().json()
        if _HALVES.search(await self.body()):
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise HTTPException(400, "the body holds a lone surrogate, half of a character") from None
        return value


def nesting(body: bytes) -> int:
    """How deep the objects and lists of a JSON text are nested."""
    brackets = np.frombuffer(_STRINGS.sub(b"", body).translate(None, _NOT_BRACKETS), np.uint8)
    if not len(brackets):
        return 0
    steps = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
    return int(steps.cumsum().max())


def check_length(num_chars: int, context: int, param: str) -> None:
    """Raises ApiError if a text is so long that it need not be encoded to know that the context cannot hold it."""
    if num_chars > context * MAX_CHARS_PER_TOKEN:
        raise ApiError(
            400,
            f"{param} has {num_chars} characters, more than the context holds "
            f"({context} tokens of {MAX_CHARS_PER_TOKEN} characters)",
            param=param,
            code="context_length_exceeded",
        )
