"""`/generate` and `/generate_stream`: texts that go on from a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from nybble.core.outputs import CompletionOutput, PositionLogprobs
from nybble.serve.openai.job import Chunks, ChunkStream, Server, event, unless_disconnected
from nybble.serve.tgi.errors import IncompleteError, error_body
from nybble.serve.tgi.plan import Plan, make_plan
from nybble.serve.tgi.schemas import GenerateBody
from nybble.serve.tgi.tokens import TokenTeller, prefill


@dataclass(slots=True)
class _Sample:
    """One answer, as it grows."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, part: CompletionOutput) -> None:
        self.text += part.text
        self.token_ids += part.token_ids
        self.logprobs += part.logprobs or []
        self.finish_reason = _finish_reason(part)

    @property
    def mean_logprob(self) -> float:
        """Of its tokens: what the best of several is chosen by."""
        chosen = [position[i].logprob for i, position in zip(self.token_ids, self.logprobs, strict=True)]
        return sum(chosen) / max(len(chosen), 1)


def _finish_reason(part: CompletionOutput) -> str:
    if part.finish_reason == "abort":
        raise IncompleteError
    if part.finish_reason == "stop":
        return "stop_sequence" if isinstance(part.stop_reason, str) else "eos_token"
    return part.finish_reason or ""


class Generate:
    """The routes over one model."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def whole(self, body: GenerateBody, request: Request, *, as_list: bool = False) -> Response:
        """The whole answer. as_list: in a list of one, as `/` gives it.

        Raises:
            ApiError, NybbleError: the request cannot be served.
        """
        server = self._server
        plan = await asyncio.to_thread(make_plan, server, body, stream=False)
        with server.admission.admit(server.cost(len(plan.prompt), plan.params)):
            answer = await unless_disconnected(request, self._answer(plan))
        return JSONResponse([answer] if as_list else answer)

    async def _answer(self, plan: Plan) -> dict[str, Any]:
        samples = [_Sample() for _ in range(plan.params.n)]
        prompt_logprobs: list[PositionLogprobs | None] | None = None
        async with aclosing(self._server.run(plan.prompt, plan.params, text=plan.inputs)) as stream:
            async for output in stream:
                prompt_logprobs = output.prompt_logprobs
                for part in output.outputs:
                    samples[part.index].add(part)
        best = max(range(len(samples)), key=lambda i: samples[i].mean_logprob) if len(samples) > 1 else 0
        answer: dict[str, Any] = {"generated_text": plan.text_before + samples[best].text}
        if plan.with_details:
            told = prefill(plan.prompt, prompt_logprobs, self._server.engine.tokenizer) if plan.with_prompt else []
            every = [self._details(plan, number, sample, told) for number, sample in enumerate(samples)]
            answer["details"] = every[best]
            if len(samples) > 1:
                answer["details"] = {**every[best], "best_of_sequences": self._others(plan, samples, every, best)}
        return answer

    def _details(self, plan: Plan, number: int, sample: _Sample, told: list[dict[str, Any]]) -> dict[str, Any]:
        teller, last = TokenTeller(self._server.engine.tokenizer), len(sample.token_ids) - 1
        pairs = list(zip(sample.token_ids, sample.logprobs, strict=True))
        details = {
            "finish_reason": sample.finish_reason,
            "generated_tokens": len(sample.token_ids),
            "seed": None if plan.seed is None else (plan.seed + number) % 2**64,
            "prefill": told,
            "tokens": [teller.token(i, position, is_last=at == last) for at, (i, position) in enumerate(pairs)],
        }
        if plan.num_top_tokens:
            details["top_tokens"] = [teller.top(position, plan.num_top_tokens) for _, position in pairs]
        return details

    @staticmethod
    def _others(plan: Plan, samples: list[_Sample], every: list[dict[str, Any]], best: int) -> list[dict[str, Any]]:
        return [
            {"generated_text": plan.text_before + sample.text, **details}
            for number, (sample, details) in enumerate(zip(samples, every, strict=True))
            if number != best
        ]

    async def stream(self, body: GenerateBody, request: Request) -> Response:
        """Server-sent events, one for each token.

        Raises:
            ApiError, NybbleError: the request cannot be served.
        """
        server = self._server
        plan = await asyncio.to_thread(make_plan, server, body, stream=True)
        with ExitStack() as admitted:
            admitted.enter_context(server.admission.admit(server.cost(len(plan.prompt), plan.params)))
            chunks = self._chunks(plan)
            first = await unless_disconnected(request, anext(chunks))
            return ChunkStream(_events(first, chunks), chunks, admitted.pop_all(), media_type="text/event-stream")

    async def _chunks(self, plan: Plan) -> Chunks:
        server, sample = self._server, _Sample()
        teller = TokenTeller(server.engine.tokenizer)
        async with aclosing(server.run(plan.prompt, plan.params, text=plan.inputs)) as stream:
            async for output in stream:
                for part in output.outputs:
                    before = len(sample.token_ids)
                    sample.add(part)
                    for at, (token_id, position) in enumerate(zip(part.token_ids, part.logprobs or [], strict=True), 1):
                        is_last = part.finish_reason is not None and at == len(part.token_ids)
                        chunk: dict[str, Any] = {
                            "index": before + at,
                            "token": teller.token(token_id, position, is_last=is_last),
                            "generated_text": plan.text_before + sample.text if is_last else None,
                            "details": self._ending(plan, sample) if is_last else None,
                        }
                        if plan.num_top_tokens:
                            chunk["top_tokens"] = teller.top(position, plan.num_top_tokens)
                        yield chunk

    @staticmethod
    def _ending(plan: Plan, sample: _Sample) -> dict[str, Any] | None:
        if not plan.with_details:
            return None
        return {
            "finish_reason": sample.finish_reason,
            "generated_tokens": len(sample.token_ids),
            "input_length": len(plan.prompt),
            "seed": plan.seed,
        }


async def _events(first: dict[str, Any], chunks: Chunks) -> AsyncGenerator[bytes, None]:
    yield event(first)
    try:
        async for chunk in chunks:
            yield event(chunk)
    except Exception as error:  # too late for a status: it is the last event
        yield event(error_body(error))
