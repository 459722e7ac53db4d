"""Who may ask, and how much may be sent: checked before anything of a request is read."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from nybble.serve.errors import error_response
from nybble.serve.settings import ServeSettings, is_loopback

Scope = MutableMapping[str, Any]
Messages = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Messages, Send], Awaitable[None]]

# Answered to everybody: a supervisor has no key. Any other path, known or not, wants it.
_OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
# Its route writes the body to the disk as it comes, and looks itself whether there is room.
_UPLOADS = "/api/blobs/"


class Guard:
    """ASGI middleware: host names, the API key and the size of bodies."""

    def __init__(self, app: App, settings: ServeSettings) -> None:
        self._app = app
        self._settings = settings
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Messages, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope, dict(scope["headers"]))  # h11 has made the names lower case
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive if scope["path"].startswith(_UPLOADS) else self._limited(receive), send)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> Any:
        settings = self._settings
        if sum(len(name) + len(value) for name, value in scope["headers"]) > settings.max_header_bytes:
            return error_response(431, f"the headers are larger than {settings.max_header_bytes} bytes")
        if settings.checks_host and not is_loopback(_host_name(headers.get(b"host", b"").decode("latin-1"))):
            return error_response(403, "this server answers only under the name localhost or 127.0.0.1")
        if self._key is not None and scope["path"] not in _OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Compared in constant time, so that the time of the answer says nothing about the key.
            same = hmac.compare_digest(given.strip(), self._key)
            if scheme.lower() != b"bearer" or not same:
                return error_response(
                    401,
                    "a valid API key is needed: send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0").decode("latin-1")
        is_upload = scope["path"].startswith(_UPLOADS)
        if not length.isdecimal() or (int(length) > settings.max_body_bytes and not is_upload):
            return error_response(413, _too_large(settings))
        return None

    def _limited(self, receive: Messages) -> Messages:
        """Bodies without a length are counted as they come."""
        left = self._settings.max_body_bytes

        async def counted() -> MutableMapping[str, Any]:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, _too_large(self._settings))
            return message

        return counted


def _too_large(settings: ServeSettings) -> str:
    return f"the body is larger than {settings.max_body_bytes} bytes"


def _host_name(host: str) -> str:
    """Without the port: of `localhost:8000`, `127.0.0.1` and `[::1]:8000`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
