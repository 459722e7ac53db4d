"""The paths of TGI's API."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import Response

from nybble import __version__
from nybble.serve.bodies import check_length
from nybble.serve.errors import ApiError
from nybble.serve.models import Models, Resident
from nybble.serve.openai.conversation import prompt_ids
from nybble.serve.tgi.errors import TgiRoute
from nybble.serve.tgi.generate import Generate
from nybble.serve.tgi.schemas import ChatTokenizeBody, GenerateBody
from nybble.serve.tgi.tokens import with_offsets


def add_tgi_routes(app: FastAPI, models: Models) -> None:
    """Add them. `/health` and `/metrics` are there already, `/tokenize` calls `tokenized`."""
    router = APIRouter(route_class=TgiRoute, include_in_schema=False)

    async def generate(body: GenerateBody, request: Request, name: str | None = None) -> Response:
        """As `/` does: in one piece or streamed, as the body says."""

        def make(one: Resident) -> Awaitable[Response]:
            made = Generate(one.server)
            return made.stream(body, request) if body.stream else made.whole(body, request, as_list=True)

        return await models.answer(_asked(models, body, name), make)

    @router.post("/")
    async def either(body: GenerateBody, request: Request) -> Response:
        return await generate(body, request)

    @router.post("/models/{name:path}")
    async def of_model(name: str, body: GenerateBody, request: Request) -> Response:
        return await generate(body, request, name)

    @router.post("/generate")
    async def whole(body: GenerateBody, request: Request) -> Response:
        if body.stream:
            raise ApiError(400, "stream is for / and /generate_stream", param="stream")
        return await models.answer(_asked(models, body), lambda one: Generate(one.server).whole(body, request))

    @router.post("/generate_stream")
    async def streamed(body: GenerateBody, request: Request) -> Response:
        if body.stream is False:
            raise ApiError(400, "stream is false: ask /generate for an answer in one piece", param="stream")
        return await models.answer(_asked(models, body), lambda one: Generate(one.server).stream(body, request))

    @router.post("/chat_tokenize")
    async def chat_tokenize(body: ChatTokenizeBody) -> dict[str, Any]:
        return await models.answer(models.meant(body.model), lambda one: _chat_tokenized(one, body))

    @router.get("/info")
    async def info() -> dict[str, Any]:
        return await models.answer(models.meant(None), _described)

    app.include_router(router)


def _asked(models: Models, body: GenerateBody, name: str | None = None) -> str:
    """The model that a body is for: the adapter that it names, that of the path, or the only one there is."""
    adapter = body.parameters.adapter_id if body.parameters is not None else None
    if adapter is not None and name is not None and adapter != name:
        raise ApiError(400, "adapter_id names another model than the path does", param="adapter_id")
    return adapter or name or models.meant(None)


async def _chat_tokenized(one: Resident, body: ChatTokenizeBody) -> dict[str, Any]:
    tokenizer = one.server.engine.tokenizer

    def told() -> dict[str, Any]:
        ids = prompt_ids(one.server, body.messages, body.tools, None)
        return {
            "tokenize_response": with_offsets(ids, tokenizer),
            "templated_text": tokenizer.decode(ids, skip_special=False),
        }

    return await asyncio.to_thread(told)


async def tokenized(one: Resident, inputs: str, *, add_special: bool) -> list[dict[str, Any]]:
    """What `/tokenize` answers to `inputs`.

    Raises:
        ApiError: the text is too long.
    """
    engine = one.server.engine
    check_length(len(inputs), engine.context, "inputs")

    def told() -> list[dict[str, Any]]:
        return with_offsets(engine.tokenizer.encode(inputs, add_special=add_special), engine.tokenizer)

    return await asyncio.to_thread(told)


async def _described(one: Resident) -> dict[str, Any]:
    settings, context = one.server.settings, one.server.engine.context
    return {
        "model_id": one.name,
        "model_sha": None if one.stored is None else one.stored.digest.removeprefix("sha256:"),
        "model_dtype": None,  # every tensor has its own
        "model_device_type": "cpu",
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": settings.max_queue,
        "max_best_of": settings.max_n,
        "max_stop_sequences": settings.max_stop_strings,
        "max_input_tokens": context - 1,
        "max_total_tokens": context,
        "validation_workers": 1,
        "max_client_batch_size": 1,
        "router": "nybble",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
