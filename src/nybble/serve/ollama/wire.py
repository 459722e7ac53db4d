"""How answers look on the wire: lines of JSON, Ollama's shape of errors, times, and headers that warn."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nybble.serve.bodies import JsonRoute
from nybble.serve.errors import as_api_error
from nybble.serve.openai.job import Chunks, ChunkStream, unless_disconnected
from nybble.serve.settings import is_loopback

logger = logging.getLogger(__name__)

WARNINGS = "X-Nybble-Warning"
TRUNCATED = "X-Context-Truncated"
_MAX_HEADER_CHARS = 1000
_MAX_NOTES = 32


@dataclass(slots=True)
class Notes:
    """What a request asked for and does not get. warnings: sentences. truncated: what was left out of its text."""

    warnings: list[str] = field(default_factory=list)
    truncated: str | None = None

    def headers(self) -> dict[str, str]:
        """Headers that say so; the log hears of it too."""
        told: dict[str, str] = {}
        if self.warnings:
            text = "; ".join(self.warnings[:_MAX_NOTES])
            logger.warning("Ollama's API: %s", text)
            told[WARNINGS] = _header(text)
        if self.truncated is not None:
            logger.warning("Ollama's API: the context was too short, left out: %s", self.truncated)
            told[TRUNCATED] = _header(self.truncated)
        return told


def _header(text: str) -> str:
    """As the value of a header: ASCII in one line."""
    plain = text.encode("ascii", "backslashreplace").decode()
    return "".join(character if character.isprintable() else " " for character in plain)[:_MAX_HEADER_CHARS]


def timestamp(seconds: float | None = None) -> str:
    """RFC 3339, of now or of so many seconds since 1970."""
    now = datetime.datetime.now(datetime.UTC)
    when = now if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


def nanoseconds(begin: float | None, end: float | None) -> int:
    """Between two times in seconds; 0 where one of them never came."""
    return 0 if begin is None or end is None else max(int((end - begin) * 1e9), 0)


def line(data: dict[str, Any]) -> bytes:
    """One line of a stream."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


async def answer_with(request: Request, chunks: Chunks, notes: Notes, *, stream: bool) -> Response:
    """The chunks as lines, or as one object that holds what all of them say.

    Raises:
        Exception: whatever comes before the first chunk, so that it is an answer with a status of its own.
    """
    if stream:
        first = await unless_disconnected(request, anext(chunks))
        return ChunkStream(
            _lines(first, chunks), chunks, ExitStack(), media_type="application/x-ndjson", headers=notes.headers()
        )
    try:
        whole = await unless_disconnected(request, _joined(chunks))
    finally:
        await chunks.aclose()
    return JSONResponse(whole, headers=notes.headers())


async def _lines(first: dict[str, Any], chunks: Chunks) -> AsyncGenerator[bytes, None]:
    yield line(first)
    try:
        async for chunk in chunks:
            yield line(chunk)
    except Exception as error:  # too late for a status
        yield line({"error": as_api_error(error).message})


async def _joined(chunks: Chunks) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    async for chunk in chunks:
        if "status" in chunk:  # of a model that is made or fetched: the last one counts
            whole = chunk
        else:
            _join(whole, chunk)
    return whole


# Fields of which every chunk brings a part.
_TEXTS = ("response", "thinking", "content")
_LISTS = ("logprobs", "tool_calls")


def _join(whole: dict[str, Any], chunk: dict[str, Any]) -> None:
    for name, value in chunk.items():
        if name in _TEXTS:
            whole[name] = whole.get(name, "") + value
        elif name in _LISTS:
            whole[name] = [*whole.get(name, ()), *value]
        elif name == "message":
            _join(whole.setdefault(name, {}), value)
        else:
            whole[name] = value


class OllamaRoute(JsonRoute):
    """A route whose body is JSON whatever its Content-Type says: `curl -d` calls it a form."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope = {**scope, "headers": list(scope["headers"])}
        MutableHeaders(scope=scope)["content-type"] = "application/json"
        await super().handle(scope, receive, send)


class OllamaShape:
    """ASGI middleware over the paths below /api/: errors in Ollama's shape, and no web page of another origin.

    A page needs no permission to send a form, and forms are read as JSON here; but it cannot hide its origin.
    """

    def __init__(self, app: ASGIApp, allowed_origins: Sequence[str] = ()) -> None:
        self._app = app
        self._allowed = frozenset(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/api/"):
            await self._app(scope, receive, send)
            return
        origin = Headers(scope=scope).get("origin")
        if origin is not None and not self._may_ask(origin):
            refusal = {"error": "this web page's origin may not ask: start the server with --allowed-origins"}
            await JSONResponse(refusal, 403)(scope, receive, send)
            return
        await self._app(scope, receive, _Reshaped(send))

    def _may_ask(self, origin: str) -> bool:
        if origin in self._allowed or "*" in self._allowed:
            return True
        try:
            parts = urlsplit(origin)
            host = parts.hostname or ""
        except ValueError:
            return False
        # Programs that show pages of their own have schemes of their own: app://, tauri://, vscode-webview://.
        return is_loopback(host) if parts.scheme in ("http", "https") else bool(parts.scheme)


class _Reshaped:
    """Holds an error's answer back until it is complete, and sends it as {"error": text}."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            is_error = message["status"] >= 400
            if is_error and Headers(raw=message["headers"]).get("content-type") == "application/json":
                self._start = message
                return
        elif self._start is not None and message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body"):
                await self._reshape(self._start)
            return
        await self._send(message)

    async def _reshape(self, start: Message) -> None:
        body = self._body
        told = json.loads(body) if body else {}  # the answer to HEAD has none
        if isinstance(told.get("error"), dict):
            body = json.dumps({"error": told["error"]["message"]}).encode()
        if start["status"] == 429:  # what Ollama says when its queue is full
            start["status"] = 503
        headers = MutableHeaders(raw=list(start["headers"]))
        headers["content-length"] = str(len(body))
        await self._send({**start, "headers": headers.raw})
        await self._send({"type": "http.response.body", "body": body})
