"""`nybble ps`: the models that a running server has in memory."""

from __future__ import annotations

import datetime
from typing import Any

from nybble.cli.list import show_table, size_text
from nybble.cli.server_client import HostOption, ServerClient

_UNITS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
_FOR_EVER = 10 * 365 * 86400  # seconds


def ps(host: HostOption = "127.0.0.1:8000") -> None:
    """List the models that a running `nybble serve` has in memory, the one that was used last first."""
    told, _ = ServerClient.at(host).ask("GET", "/api/ps")
    show_table([("NAME", "ID", "SIZE", "CONTEXT", "UNTIL"), *map(_row, told.get("models", []))])


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    digest, context = str(model.get("digest", ""))[:12], str(model.get("context_length", ""))
    return str(model.get("name", "")), digest, size_text(int(model.get("size", 0))), context, _until(model)


def _until(model: dict[str, Any]) -> str:
    try:
        end = datetime.datetime.fromisoformat(str(model.get("expires_at")))
        seconds = (end - datetime.datetime.now(datetime.UTC)).total_seconds()
    except (ValueError, TypeError):
        return ""
    if seconds > _FOR_EVER:
        return "the server stops"
    for length, unit in _UNITS:
        count = int(seconds // length)
        if count > 0:
            return f"{count} {unit}{'s' * (count > 1)} from now"
    return "now"
