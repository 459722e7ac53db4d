"""The routes that change which models there are: create, blobs, copy, delete and pull."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from nybble.core.errors import ModelNotFoundError
from nybble.serve.errors import ApiError
from nybble.serve.models import Models
from nybble.serve.ollama.schemas import CopyBody, CreateBody, ModelBody, StreamedBody
from nybble.serve.ollama.wire import Notes, answer_with
from nybble.serve.ollama.work import Tell, Workshop
from nybble.store import Library, PullProgress
from nybble.store.create import Quantize
from nybble.store.modelfile import DEPRECATED, PARAMETERS, ROLES, Command, format_modelfile
from nybble.store.names import parse_digest

Quantizer = Callable[[str], Quantize]


class Manage:
    """The routes."""

    def __init__(self, models: Models, quantizer: Quantizer | None) -> None:
        """quantizer: from the name of a GGUF type to what writes it; None: nothing is quantised here."""
        self._models = models
        self._quantizer = quantizer
        self._workshop = Workshop()

    @property
    def library(self) -> Library:
        """Raises ApiError if the server has one model and no library."""
        if self._models.library is None:
            raise ApiError(400, "this server has one model and no library: start it without naming a model")
        return self._models.library

    # ---- create ----

    async def create(self, body: CreateBody, request: Request) -> Response:
        """A new model, told as lines of status.

        Raises:
            ApiError, NybbleError: the request cannot be served.
        """
        if body.modelfile is not None:
            raise ApiError(
                400, "modelfile is not supported: send from or files, and the other fields", param="modelfile"
            )
        library, name = self.library, body.asked
        text, files = _modelfile(body)
        quantize = None if not body.quantize else self._quantize(body.quantize)
        notes = Notes([f"there is no field {field!a:.60}: it has no effect" for field in body.unknown()])
        notes.warnings += [f"PARAMETER {one} has no effect" for one in body.parameters or {} if one in DEPRECATED]

        def work(tell: Tell) -> None:
            library.create(
                name,
                text,
                base_folder=Path("/"),
                progress=lambda status: tell({"status": status}),
                files=files,
                quantize=quantize,
            )

        return await answer_with(request, self._workshop.told(work), notes, stream=body.stream is not False)

    def _quantize(self, to: str) -> Quantize:
        if self._quantizer is None:
            raise ApiError(400, "quantize is not supported by this server: use `nybble create -q`", param="quantize")
        return self._quantizer(to)

    # ---- blobs ----

    async def has_blob(self, digest: str) -> Response:
        """200 or 404, without a body."""
        found = await asyncio.to_thread(self.library.has_blob, _digest(digest))
        return Response(status_code=200 if found else 404)

    async def write_blob(self, digest: str, request: Request) -> Response:
        """Store what is sent, piece by piece.

        Raises:
            ApiError: there is no room for it, or nothing comes any more.
            ConfigError: it is not what the digest says.
        """
        library, digest = self.library, _digest(digest)
        if await asyncio.to_thread(library.has_blob, digest):
            return Response(status_code=200)
        length = request.headers.get("content-length", "0")
        free = shutil.disk_usage(_existing(library.root)).free
        if not length.isdecimal() or int(length) > free:
            raise ApiError(413, f"the blob has {length:.20} bytes, and {free} are free where models are kept")
        try:
            await self._workshop.sent(request.stream(), lambda pieces: library.write_blob(digest, pieces))
        except ClientDisconnect:
            raise ApiError(499, "the client has left") from None
        return Response(status_code=201)

    # ---- copy, delete, pull, push ----

    async def copy(self, body: CopyBody) -> Response:
        """Raises ApiError 404 if there is no such model."""
        with _not_found():
            await asyncio.to_thread(self.library.copy, body.source, body.destination)
        return Response(status_code=200)

    async def delete(self, body: ModelBody) -> Response:
        """Raises ApiError 404 if there is no such model, StoreError if it belongs to another program."""
        with _not_found():
            await asyncio.to_thread(self.library.remove, body.asked)
        with contextlib.suppress(ApiError):
            await self._models.unload(body.asked)
        return Response(status_code=200)

    async def pull(self, body: StreamedBody, request: Request) -> Response:
        """Fetch a model, told as lines of progress. It stops when the client leaves, and goes on from there later.

        Raises:
            ApiError: 404, there is no such model.
        """
        library, name = self.library, body.asked
        notes = Notes([f"there is no field {field!a:.60}: it has no effect" for field in body.unknown()])
        if body.insecure:
            notes.warnings.append("insecure has no effect: models come over HTTPS")

        def work(tell: Tell) -> None:
            library.pull(name, lambda progress: tell(_progress(progress)))

        return await answer_with(request, self._workshop.told(work), notes, stream=body.stream is not False)

    async def push(self, body: StreamedBody) -> Response:
        """Raises ApiError: nothing is ever uploaded."""
        raise ApiError(400, "push is not supported: nybble uploads nothing", param="push")


@contextlib.contextmanager
def _not_found() -> Iterator[None]:
    try:
        yield
    except ModelNotFoundError as error:
        raise ApiError(404, str(error)) from None


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.parents) if one.exists())


def _digest(text: str) -> str:
    return f"sha256:{parse_digest(text)}"


def _progress(progress: PullProgress) -> dict[str, Any]:
    told = {"digest": progress.digest, "total": progress.total, "completed": progress.completed}
    return {"status": progress.status, **{name: value for name, value in told.items() if value is not None}}


def _modelfile(body: CreateBody) -> tuple[str, dict[str, str]]:
    """The Modelfile that the fields amount to, and the files that it names."""
    files = dict(body.files or {})
    if bool(body.from_) == bool(files):
        raise ApiError(400, "give either from, the name of a model, or files, one model file", param="from")
    if len(files) > 1:
        raise ApiError(400, "files must name one GGUF file: a model of several files cannot be sent", param="files")
    adapters = dict(body.adapters or {})
    if files.keys() & adapters.keys():
        raise ApiError(400, "files and adapters have a name in common", param="adapters")
    for digest in (*files.values(), *adapters.values()):
        _digest(digest)
    source = body.from_ or next(iter(files))
    commands = [Command("FROM", source), *(Command("ADAPTER", name) for name in adapters)]
    if body.template is not None:
        commands.append(Command("TEMPLATE", body.template))
    if body.system is not None:
        commands.append(Command("SYSTEM", body.system))
    commands += _parameters(body.parameters or {})
    for place, message in enumerate(body.messages or ()):
        if message.role not in ROLES:
            raise ApiError(400, f"messages.{place}.role must be one of {', '.join(ROLES)}", param="messages")
        commands.append(Command("MESSAGE", message.content, message.role))
    licenses = [body.license] if isinstance(body.license, str) else body.license or []
    commands += [Command("LICENSE", text) for text in licenses]
    empty = next((command for command in commands if not command.value.strip()), None)
    if empty is not None:
        raise ApiError(400, f"{(empty.argument or empty.word).lower()} is empty: give it a value, or leave it out")
    return format_modelfile(commands), {**files, **adapters}


def _parameters(given: Mapping[str, Any]) -> Iterator[Command]:
    for name, value in given.items():
        if name in DEPRECATED or value is None:
            continue
        if name not in PARAMETERS:
            known = ", ".join(PARAMETERS)
            raise ApiError(400, f"there is no parameter {name!a:.60}; there are {known}", param="parameters")
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, bool | int | float | str):
                raise ApiError(400, f"the parameter {name} must be a number or a text", param="parameters")
            yield Command("PARAMETER", str(one).lower() if isinstance(one, bool) else str(one), name)
