"""The paths of Ollama's HTTP API."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import PlainTextResponse
from starlette.responses import Response

from nybble.core.errors import ModelNotFoundError
from nybble.serve.errors import ApiError
from nybble.serve.models import Models
from nybble.serve.ollama.answer import Answers
from nybble.serve.ollama.describe import listed, running, shown
from nybble.serve.ollama.embed import Embedding
from nybble.serve.ollama.manage import Manage, Quantizer
from nybble.serve.ollama.schemas import (
    ChatBody,
    CopyBody,
    CreateBody,
    EmbedBody,
    GenerateBody,
    ModelBody,
    OldEmbedBody,
    ShowBody,
    StreamedBody,
)
from nybble.serve.ollama.wire import OllamaRoute, OllamaShape

# Clients ask for it to know what the API can do: that of Ollama whose fields these are.
OLLAMA_VERSION = "0.13.0"


def add_ollama_routes(
    app: FastAPI, models: Models, *, allowed_origins: Sequence[str] = (), quantizer: Quantizer | None = None
) -> None:
    """Add the routes, and their shape of errors around whatever middleware is there already.

    allowed_origins: of web pages that may ask, besides those of this machine. quantizer: what does `quantize` of
    /api/create.
    """
    router = APIRouter(route_class=OllamaRoute, include_in_schema=False)
    _add_answers(router, models)
    _add_descriptions(router, models)
    _add_management(router, Manage(models, quantizer))
    app.include_router(router)
    app.add_middleware(OllamaShape, allowed_origins=allowed_origins)


def _add_answers(router: APIRouter, models: Models) -> None:
    answers, embedding = Answers(models), Embedding(models)

    @router.post("/api/generate")
    async def generate(body: GenerateBody, request: Request) -> Response:
        return await answers.generate(body, request)

    @router.post("/api/chat")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await answers.chat(body, request)

    @router.post("/api/embed")
    async def embed(body: EmbedBody, request: Request) -> Response:
        return await embedding.embed(body, request)

    @router.post("/api/embeddings")
    async def embeddings(body: OldEmbedBody, request: Request) -> Response:
        return await embedding.old(body, request)


def _add_descriptions(router: APIRouter, models: Models) -> None:
    @router.api_route("/", methods=["GET", "HEAD"])
    async def root() -> Response:
        return PlainTextResponse("Ollama is running")  # clients look for these words

    @router.api_route("/api/version", methods=["GET", "HEAD"])
    async def version() -> dict[str, str]:
        return {"version": OLLAMA_VERSION}

    @router.api_route("/api/tags", methods=["GET", "HEAD"])
    async def tags() -> dict[str, Any]:
        library, residents = models.library, models.resident()
        return {"models": await asyncio.to_thread(lambda: listed(library.list() if library else [], residents))}

    @router.get("/api/ps")
    async def ps() -> dict[str, Any]:
        residents = models.resident()
        return {"models": await asyncio.to_thread(running, residents)}

    @router.post("/api/show")
    async def show(body: ShowBody) -> dict[str, Any]:
        name = body.asked
        library = models.library
        if library is None:
            raise ApiError(404, "this server has one model and no library to look it up in: see /api/tags")
        for field in ("system", "template", "options"):
            if getattr(body, field) is not None:
                raise ApiError(400, f"{field} is not supported here: /api/create makes a model with it", param=field)

        def found() -> dict[str, Any]:
            return shown(library.get(name), verbose=body.verbose is True)

        try:
            return await asyncio.to_thread(found)
        except ModelNotFoundError as error:
            raise ApiError(404, str(error)) from None


def _add_management(router: APIRouter, manage: Manage) -> None:
    @router.post("/api/create")
    async def create(body: CreateBody, request: Request) -> Response:
        return await manage.create(body, request)

    @router.head("/api/blobs/{digest}")
    async def has_blob(digest: str) -> Response:
        return await manage.has_blob(digest)

    @router.post("/api/blobs/{digest}")
    async def write_blob(digest: str, request: Request) -> Response:
        return await manage.write_blob(digest, request)

    @router.post("/api/copy")
    async def copy(body: CopyBody) -> Response:
        return await manage.copy(body)

    @router.delete("/api/delete")
    async def delete(body: ModelBody) -> Response:
        return await manage.delete(body)

    @router.post("/api/pull")
    async def pull(body: StreamedBody, request: Request) -> Response:
        return await manage.pull(body, request)

    @router.post("/api/push")
    async def push(body: StreamedBody) -> Response:
        return await manage.push(body)
