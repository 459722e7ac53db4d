"""Who may ask, and how much may be sent: checked before anything of a request is read."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from nybble.serve.errors import error_response
from nybble.serve.settings import LOOPBACK, ServeSettings

Scope = MutableMapping[str, Any]
Messages = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Messages, Send], Awaitable[None]]

# Answered to everybody: a supervisor has no key.
_OPEN_PATHS = frozenset({"/health", "/ready", "/version"})


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
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> Any:
        settings = self._settings
        if settings.checks_host and _host_name(headers.get("host", "")) not in LOOPBACK:
            return error_response(403, "this server answers only under the name localhost or 127.0.0.1")
        if self._key is not None and scope["path"] not in _OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # Compared in constant time, so that the time of the answer says nothing about the key.
            same = hmac.compare_digest(given.strip().encode(), self._key)
            if scheme.lower() != "bearer" or not same:
                return error_response(
                    401,
                    "a valid API key is needed: send it as 'Authorization: Bearer KEY'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > settings.max_body_bytes:
            return _too_large(settings)
        return None

    def _limited(self, receive: Messages) -> Messages:
        """Bodies without a length are counted as they come."""
        left = self._settings.max_body_bytes

        async def counted() -> MutableMapping[str, Any]:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                return {"type": "http.disconnect"}
            return message

        return counted


def _too_large(settings: ServeSettings) -> Any:
    return error_response(413, f"the body is larger than {settings.max_body_bytes} bytes")


def _host_name(host: str) -> str:
    """Without the port: of `localhost:8000`, `127.0.0.1` and `[::1]:8000`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()
