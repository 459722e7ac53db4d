"""Asking a server of nybble that runs already, over Ollama's routes."""

from __future__ import annotations

import http.client
import json
import os
import re
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from nybble.core.errors import ConfigError, ModelNotFoundError, NybbleError

DEFAULT_PORT = 8000
_SECONDS = 60.0  # that an answer may take: a model that is in use leaves when it is done, and nobody waits for that
_MAX_BYTES = 1 << 24
_ADDRESS = re.compile(r"(?:http://)?(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]*)(?::(\d{1,5}))?/?")

HostOption = Annotated[
    str,
    typer.Option("--host", envvar="NYBBLE_HOST", help="Where the server listens: HOST:PORT; 127.0.0.1:8000."),
]


@dataclass(frozen=True, slots=True)
class ServerClient:
    """A server's address. Its key, if it wants one, is in NYBBLE_API_KEY."""

    host: str
    port: int

    @classmethod
    def at(cls, address: str) -> ServerClient:
        """`HOST`, `HOST:PORT`, `:PORT`, with or without `http://`. Raises ConfigError if it is none of these."""
        found = _ADDRESS.fullmatch(address.strip())
        port = int(found[2]) if found is not None and found[2] is not None else DEFAULT_PORT
        if found is None or not 0 < port < 2**16:
            raise ConfigError(f"{address!r:.100} is not where a server listens: write HOST:PORT, like 127.0.0.1:8000")
        return cls(found[1].strip("[]") or "127.0.0.1", port)

    def __str__(self) -> str:
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
        """The answer of a route, and what the server warns of.

        Raises:
            ConfigError: no server of ours answers there.
            ModelNotFoundError, NybbleError: the server says why not.
        """
        status, headers, content = self._exchange(method, path, body)
        try:
            told = json.loads(content)
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise ConfigError(f"what answers at {self} is not nybble: it says {content[:60]!r}")
        if status >= 400:
            error = told.get("error")
            message = error.get("message") if isinstance(error, dict) else error
            hint = ": set NYBBLE_API_KEY" if status == 401 else ""
            kind = ModelNotFoundError if status == 404 else NybbleError
            raise kind(f"the server at {self} says: {message}{hint}")
        warning = headers.get("X-Nybble-Warning")
        return told, [warning] if warning else []

    def _exchange(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        key = os.environ.get("NYBBLE_API_KEY")
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        # No proxy of the environment: a server is meant, and nearly always one of this machine.
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_SECONDS)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read(_MAX_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise ConfigError(
                f"no server answers at {self} ({why}): start one with `nybble serve`, or say with --host or "
                "NYBBLE_HOST where it listens"
            ) from None
        finally:
            connection.close()
