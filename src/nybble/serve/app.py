"""The server's one ASGI application."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.responses import Response

from nybble import __version__
from nybble.engine.async_engine import AsyncEngine
from nybble.engine.roofline import Roofline
from nybble.serve.admission import Admission
from nybble.serve.bodies import JsonRoute, check_length
from nybble.serve.errors import ApiError, add_error_handlers
from nybble.serve.guard import Guard
from nybble.serve.metrics import Metrics
from nybble.serve.openai.chat import Chat
from nybble.serve.openai.completions import Completions
from nybble.serve.openai.conversation import prompt_ids
from nybble.serve.openai.embeddings import Embeddings
from nybble.serve.openai.job import Server
from nybble.serve.openai.schemas import ChatBody, CompletionBody, DetokenizeBody, EmbeddingBody, TokenizeBody
from nybble.serve.settings import ServeSettings


def create_app(engine: AsyncEngine, settings: ServeSettings, roofline: Roofline | None = None) -> FastAPI:
    """The routes over an engine. `app.state.server` is what they share.

    roofline: of this machine, for the metrics, if it was measured.
    """
    admission = Admission(settings)
    metrics = Metrics(engine.stats, lambda: admission.num_refused, roofline)
    server = Server(engine, settings, admission, metrics, int(time.time()))
    app = FastAPI(title="nybble", version=__version__, docs_url=None, redoc_url=None)
    app.router.route_class = JsonRoute
    app.state.server = server
    add_error_handlers(app)
    _add_openai_routes(app, server)
    _add_own_routes(app, server)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Guard, settings=settings)
    return app


def _add_openai_routes(app: FastAPI, server: Server) -> None:
    chat, completions, embeddings = Chat(server), Completions(server), Embeddings(server)
    model = {
        "id": server.settings.model_name,
        "object": "model",
        "created": server.started,
        "owned_by": "nybble",
        "max_model_len": server.engine.context,
    }

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await chat.answer(body, request)

    @app.post("/v1/completions")
    async def text_completions(body: CompletionBody, request: Request) -> Response:
        return await completions.answer(body, request)

    @app.post("/v1/embeddings")
    async def embed(body: EmbeddingBody, request: Request) -> dict[str, Any]:
        return await embeddings.answer(body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return model


def _add_own_routes(app: FastAPI, server: Server) -> None:
    engine, settings = server.engine, server.settings

    @app.get("/health")
    async def health() -> Response:
        """Whether the engine lives."""
        return JSONResponse({"status": "ok"}) if engine.is_healthy() else JSONResponse({"status": "dead"}, 503)

    @app.get("/ready")
    async def ready() -> Response:
        """Whether new requests are taken."""
        if engine.is_healthy() and server.admission.is_open:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        server.check_model(body.model or settings.model_name)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages")
        if body.prompt is not None:
            check_length(len(body.prompt), engine.context, "prompt")
            ids = await asyncio.to_thread(engine.tokenizer.encode, body.prompt, add_special=body.add_special_tokens)
        else:
            ids = await asyncio.to_thread(
                prompt_ids,
                server,
                body.messages or [],
                None,
                None,
                add_generation_prompt=body.add_generation_prompt,
            )
        return {"tokens": ids, "count": len(ids), "max_model_len": engine.context}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        server.check_model(body.model or settings.model_name)
        unknown = next((i for i in body.tokens if i >= engine.tokenizer.vocab_size), None)
        if unknown is not None:
            raise ApiError(400, f"{unknown} is not a token id of this model", param="tokens")
        return {"prompt": await asyncio.to_thread(engine.tokenizer.decode, body.tokens, skip_special=False)}
