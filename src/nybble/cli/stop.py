"""`nybble stop`: put a model of a running server out of memory."""

from __future__ import annotations

from typing import Annotated

import typer

from nybble.cli.answer import note
from nybble.cli.server_client import HostOption, ServerClient
from nybble.core.errors import ModelNotFoundError
from nybble.store import ModelName


def stop(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model, as `nybble ps` shows it.")],
    host: HostOption = "127.0.0.1:8000",
) -> None:
    """Put a model of a running `nybble serve` out of memory, as soon as those that use it are done."""
    server = ServerClient.at(host)
    told, _ = server.ask("GET", "/api/ps")
    names = [str(model.get("name")) for model in told.get("models", [])]
    if not any(_same(name, other) for other in names):
        there = f"there are {' and '.join(names)}" if names else "there is no model"
        raise ModelNotFoundError(f"{name!r:.200} is not in the memory of the server at {server}: {there}")
    _, warnings = server.ask("POST", "/api/generate", {"model": name, "keep_alive": 0, "stream": False})
    for warning in warnings:
        note(warning)
    if not warnings:
        print(f"stopped {name}")


def _same(name: str, other: str) -> bool:
    if name == other:
        return True
    try:
        return ModelName.parse(name) == ModelName.parse(other)
    except ModelNotFoundError:  # of a file, such as "My model (1)"
        return False
