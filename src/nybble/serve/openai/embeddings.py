"""`/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import Request

from nybble.serve.bodies import check_length
from nybble.serve.errors import ApiError
from nybble.serve.openai.job import Server, all_of, new_id, unless_disconnected
from nybble.serve.openai.schemas import EmbeddingBody


class Embeddings:
    """The route."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def answer(self, body: EmbeddingBody, request: Request) -> dict[str, Any]:
        """The vectors of all texts, in their order.

        Raises:
            ApiError, NybbleError: the request cannot be served.
        """
        server = self._server
        texts = await asyncio.to_thread(self._texts, body)
        num_tokens = sum(map(len, texts))
        with server.admission.admit(num_tokens):
            vectors = await unless_disconnected(request, self._embed(texts, body))
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "model": body.model,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }

    async def _embed(self, texts: list[list[int]], body: EmbeddingBody) -> list[np.ndarray[Any, Any]]:
        server = self._server
        return await all_of(
            server.engine.embed(text, new_id("embd"), pooling=body.pooling, adapter=server.adapter) for text in texts
        )

    def _texts(self, body: EmbeddingBody) -> list[list[int]]:
        given = body.input
        many: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        limit = self._server.settings.max_prompts
        if not 1 <= len(many) <= limit:
            raise ApiError(400, f"a request must have 1 to {limit} inputs, not {len(many)}", param="input")
        for one in many:
            check_length(len(one), self._server.engine.context, "input")
        encode = self._server.engine.tokenizer.encode
        return [encode(one, add_special=True) if isinstance(one, str) else list(one) for one in many]


def _encoded(vector: np.ndarray[Any, Any], encoding: str | None) -> Any:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
