"""The server's one ASGI application."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.responses import Response

from nybble import __version__
from nybble.engine.async_engine import AsyncEngine
from nybble.engine.roofline import Roofline
from nybble.serve.bodies import JsonRoute, check_length
from nybble.serve.errors import ApiError, add_error_handlers
from nybble.serve.guard import Guard
from nybble.serve.models import Models, Resident
from nybble.serve.ollama.manage import Quantizer
from nybble.serve.ollama.routes import add_ollama_routes
from nybble.serve.openai.chat import Chat
from nybble.serve.openai.completions import Completions
from nybble.serve.openai.conversation import prompt_ids
from nybble.serve.openai.embeddings import Embeddings
from nybble.serve.openai.schemas import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from nybble.serve.settings import ServeSettings
from nybble.serve.tgi.errors import answered
from nybble.serve.tgi.routes import add_tgi_routes, tokenized


def create_app(
    source: AsyncEngine | Models,
    settings: ServeSettings,
    roofline: Roofline | None = None,
    *,
    quantizer: Quantizer | None = None,
) -> FastAPI:
    """The routes over one engine or many models. `app.state.models` is what they share.

    roofline: of this machine, for the metrics, if it was measured; Models know it already. quantizer: what does
    `quantize` of Ollama's /api/create.
    """
    models = source if isinstance(source, Models) else Models.of_one(source, settings, roofline)
    app = FastAPI(title="nybble", version=__version__, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    app.state.models = models
    if models.pinned is not None:
        app.state.server = models.pinned.server
    add_error_handlers(app)
    _add_openai_routes(app, models)
    _add_own_routes(app, models)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Guard, settings=settings)
    add_tgi_routes(app, models)
    add_ollama_routes(app, models, allowed_origins=settings.allowed_origins, quantizer=quantizer)
    return app


def _add_openai_routes(app: FastAPI, models: Models) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await models.answer(body.model, lambda one: Chat(one.server).answer(body, request))

    @app.post("/v1/completions")
    async def text_completions(body: CompletionBody, request: Request) -> Response:
        return await models.answer(body.model, lambda one: Completions(one.server).answer(body, request))

    @app.post("/v1/embeddings")
    async def embed(body: EmbeddingBody, request: Request) -> dict[str, Any]:
        return await models.answer(body.model, lambda one: Embeddings(one.server).answer(body, request))

    @app.get("/v1/models")
    async def all_models() -> dict[str, Any]:
        return {"object": "list", "data": [_described(models, *one) for one in await models.names()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return _described(models, *await models.find(name))


def _described(models: Models, name: str, created: float) -> dict[str, Any]:
    """A model in OpenAI's words. How long its context is, is known while it is in memory."""
    told = {"id": name, "object": "model", "created": int(created), "owned_by": "nybble"}
    one = models.in_memory(name)
    if one is None:
        return told
    parent = {} if one.server.adapter is None else {"parent": one.parent}
    return {**told, "max_model_len": one.server.engine.context, **parent}


def _add_own_routes(app: FastAPI, models: Models) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the engine lives."""
        return JSONResponse({"status": "ok"}) if models.is_healthy() else JSONResponse({"status": "dead"}, 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests are taken."""
        if models.is_healthy() and models.admission.is_open:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(models.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> Any:
        if body.inputs is not None:
            return await answered(_tokenized_as_tgi(models, body, body.inputs))
        return await models.answer(models.meant(body.model), lambda one: _tokenized(one, body))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        return await models.answer(models.meant(body.model), lambda one: _detokenized(one, body))


async def _tokenized_as_tgi(models: Models, body: TokenizeBody, inputs: str) -> Response:
    if body.prompt is not None or body.messages is not None:
        raise ApiError(400, "inputs is TGI's name of prompt: give one of them", param="inputs")
    return JSONResponse(
        await models.answer(
            models.meant(body.model), lambda one: tokenized(one, inputs, add_special=body.add_special_tokens)
        )
    )


async def _tokenized(one: Resident, body: TokenizeBody) -> dict[str, Any]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages")
    engine = one.server.engine
    if body.prompt is not None:
        check_length(len(body.prompt), engine.context, "prompt")
        ids = await asyncio.to_thread(engine.tokenizer.encode, body.prompt, add_special=body.add_special_tokens)
    else:
        ids = await asyncio.to_thread(
            prompt_ids,
            one.server,
            body.messages or [],
            None,
            None,
            add_generation_prompt=body.add_generation_prompt,
        )
    return {"tokens": ids, "count": len(ids), "max_model_len": engine.context}


async def _detokenized(one: Resident, body: DetokenizeBody) -> dict[str, str]:
    tokenizer = one.server.engine.tokenizer
    unknown = next((i for i in body.tokens if i >= tokenizer.vocab_size), None)
    if unknown is not None:
        raise ApiError(400, f"{unknown} is not a token id of this model", param="tokens")
    return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special=False)}
