"""`/api/embed` and the older `/api/embeddings`."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from nybble.serve.bodies import check_length
from nybble.serve.errors import ApiError
from nybble.serve.models import Models, Resident
from nybble.serve.ollama.options import keep_alive_of, read_options
from nybble.serve.ollama.schemas import EmbedBody, OldEmbedBody
from nybble.serve.ollama.wire import Notes, nanoseconds
from nybble.serve.openai.job import all_of, new_id, unless_disconnected

Vector = npt.NDArray[np.float32]


class Embedding:
    """The two routes."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def embed(self, body: EmbedBody, request: Request) -> Response:
        """The vectors of all texts, each of length 1. A text that is too long is cut, and a header says so.

        Raises:
            ApiError, NybbleError: the request cannot be served.
        """
        began = time.monotonic()
        if body.input is None:
            raise ApiError(400, "input is required", param="input")
        texts = ([body.input] if body.input else []) if isinstance(body.input, str) else body.input
        notes = Notes()
        vectors, loaded, num_tokens = await self._vectors(body, texts, request, notes, cuts=body.truncate is not False)
        if body.dimensions:
            vectors = [_shortened(vector, body.dimensions) for vector in vectors]
        answer: dict[str, Any] = {
            "model": body.asked,
            "embeddings": [vector.tolist() for vector in vectors],
            "total_duration": nanoseconds(began, time.monotonic()),
            "load_duration": nanoseconds(began, loaded),
            "prompt_eval_count": num_tokens,
        }
        return JSONResponse(answer, headers=notes.headers())

    async def old(self, body: OldEmbedBody, request: Request) -> Response:
        """The vector of one text, in the shape of before. A text that is too long is an error.

        Raises:
            ApiError, NybbleError: the request cannot be served.
        """
        notes = Notes()
        texts = [body.prompt] if body.prompt else []
        vectors, _, _ = await self._vectors(body, texts, request, notes, cuts=False)
        return JSONResponse({"embedding": vectors[0].tolist() if vectors else []}, headers=notes.headers())

    async def _vectors(
        self, body: EmbedBody | OldEmbedBody, texts: list[str], request: Request, notes: Notes, *, cuts: bool
    ) -> tuple[list[Vector], float, int]:
        """The vectors, when the model was there, and the number of tokens."""
        notes.warnings += [f"there is no field {name!a:.60}: it has no effect" for name in body.unknown()]
        async with self._models.lease(body.asked, keep_alive=keep_alive_of(body.keep_alive)) as resident:
            loaded = time.monotonic()
            server = resident.server
            if len(texts) > server.settings.max_prompts:
                raise ApiError(400, f"input has more than {server.settings.max_prompts} texts", param="input")
            many = await asyncio.to_thread(_encoded, body, texts, resident, notes, cuts=cuts)
            num_tokens = sum(map(len, many))
            with server.admission.admit(num_tokens):
                work = all_of(server.engine.embed(ids, new_id("embd"), adapter=server.adapter) for ids in many)
                return await unless_disconnected(request, work), loaded, num_tokens


def _encoded(
    body: EmbedBody | OldEmbedBody, texts: list[str], resident: Resident, notes: Notes, *, cuts: bool
) -> list[list[int]]:
    engine, stored = resident.server.engine, resident.stored
    options = read_options(stored.parameters if stored is not None else {}, body.options, notes.warnings)
    limit = min(options.num_ctx or engine.context, engine.context)
    many = []
    for place, text in enumerate(texts):
        check_length(len(text), engine.context, f"input.{place}")
        ids = engine.tokenizer.encode(text, add_special=True)
        if len(ids) > limit:
            if not cuts:
                raise ApiError(400, f"the text {place} has {len(ids)} tokens and the context holds {limit}: shorten it")
            before = f"{notes.truncated}, " if notes.truncated else ""
            notes.truncated = f"{before}{len(ids) - limit} tokens of input {place}"
            ids = ids[:limit]
        many.append(ids)
    return many


def _shortened(vector: Vector, dimensions: int) -> Vector:
    """Its first dimensions, of length 1 again."""
    if dimensions > len(vector):
        raise ApiError(400, f"dimensions must be at most {len(vector)} for this model", param="dimensions")
    head = vector[:dimensions]
    length = float(np.linalg.norm(head))
    return head / np.float32(length) if length else head
