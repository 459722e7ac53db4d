"""`/v1/completions`: texts that go on from a prompt."""

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
from nybble.core.sampling import SamplingParams
from nybble.serve.bodies import check_length
from nybble.serve.errors import ApiError
from nybble.serve.openai.job import Effort, Server, all_of, event_stream, new_id, now, unless_disconnected, usage
from nybble.serve.openai.logprobs import completion_logprobs
from nybble.serve.openai.params import sampling_params
from nybble.serve.openai.schemas import CompletionBody


@dataclass(slots=True)
class _Choice:
    """One sample of one prompt, as it grows."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, sample: CompletionOutput) -> None:
        self.text += sample.text
        self.token_ids += sample.token_ids
        self.logprobs += sample.logprobs or []
        self.finish_reason = sample.finish_reason


@dataclass(slots=True)
class _Job:
    """One prompt."""

    prompt_ids: list[int]
    prompt_text: str | None
    choices: list[_Choice]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    effort: Effort = field(default_factory=Effort)


class Completions:
    """The route."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def answer(self, body: CompletionBody, request: Request) -> Response:
        """A whole answer, or a stream of server-sent events.

        Raises:
            ApiError, NybbleError: the request cannot be served.
        """
        server = self._server
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise ApiError(400, "best_of is not supported: ask for n samples and choose", param="best_of")
        if body.echo and body.stream:
            raise ApiError(400, "echo does not go with stream", param="echo")
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens must be at least 1, or 0 with echo", param="max_tokens")
        limit = body.max_tokens if body.max_tokens is None else max(body.max_tokens, 1)
        if "max_tokens" not in body.model_fields_set and server.preset.max_tokens is not None:
            limit = server.preset.max_tokens
        params = sampling_params(
            body,
            server.settings,
            max_tokens=limit,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            response_format=body.response_format,
            preset=server.preset.sampling,
        )
        jobs = [
            _Job(ids, text, [_Choice() for _ in range(params.n)])
            for ids, text in await asyncio.to_thread(self._prompts, body)
        ]
        with ExitStack() as admitted:
            admitted.enter_context(
                server.admission.admit(sum(server.cost(len(job.prompt_ids), params) for job in jobs))
            )
            if body.stream:
                return await event_stream(request, self._chunks(body, params, jobs), admitted)
            await unless_disconnected(request, self._run_all(body, params, jobs))
        return JSONResponse(self._whole(body, params, jobs))

    def _prompts(self, body: CompletionBody) -> list[tuple[list[int], str | None]]:
        """Token ids and text of each prompt."""
        given = body.prompt
        single = isinstance(given, str) or (given and isinstance(given[0], int))
        prompts: list[Any] = [given] if single else list(given)
        limit = self._server.settings.max_prompts
        if not 1 <= len(prompts) <= limit:
            raise ApiError(400, f"a request must have 1 to {limit} prompts, not {len(prompts)}", param="prompt")
        for one in prompts:
            check_length(len(one), self._server.engine.context, "prompt")
        encode = self._server.engine.tokenizer.encode
        return [
            (encode(one, add_special=body.add_special_tokens), one) if isinstance(one, str) else (list(one), None)
            for one in prompts
        ]

    async def _run_all(self, body: CompletionBody, params: SamplingParams, jobs: list[_Job]) -> None:
        async def run(job: _Job) -> None:
            async with aclosing(self._outputs(body, params, job)) as outputs:
                async for sample in outputs:
                    job.choices[sample.index].add(sample)

        await all_of(run(job) for job in jobs)

    async def _outputs(
        self, body: CompletionBody, params: SamplingParams, job: _Job
    ) -> AsyncGenerator[CompletionOutput, None]:
        stream = self._server.run(
            job.prompt_ids, params, text=job.prompt_text, priority=body.priority, cache_salt=body.cache_salt
        )
        async with aclosing(stream):
            async for output in stream:
                job.prompt_logprobs = output.prompt_logprobs
                job.effort.see(output)
                for sample in output.outputs:
                    yield sample

    async def _chunks(
        self, body: CompletionBody, params: SamplingParams, jobs: list[_Job]
    ) -> AsyncGenerator[dict[str, Any], None]:
        completion_id, created = new_id("cmpl"), now()
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        queue: asyncio.Queue[tuple[int, CompletionOutput] | BaseException | None] = asyncio.Queue()

        async def feed(number: int, job: _Job) -> None:
            try:
                async with aclosing(self._outputs(body, params, job)) as outputs:
                    async for sample in outputs:
                        queue.put_nowait((number, sample))
                queue.put_nowait(None)
            except BaseException as error:
                queue.put_nowait(error)
                raise

        def chunk(choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> dict[str, Any]:
            head = {"id": completion_id, "object": "text_completion", "created": created, "model": body.model}
            return {**head, "choices": choices, **({"usage": used} if with_usage else {})}

        tasks = [asyncio.create_task(feed(number, job)) for number, job in enumerate(jobs)]
        try:
            left = len(jobs)
            while left:
                item = await queue.get()
                if item is None:
                    left -= 1
                    continue
                if isinstance(item, BaseException):
                    raise item
                number, sample = item
                choice = jobs[number].choices[sample.index]
                offset = len(choice.text)
                choice.add(sample)
                logprobs = None
                if body.logprobs is not None:
                    logprobs = completion_logprobs(sample.token_ids, sample.logprobs or [], body.logprobs, offset)
                yield chunk(
                    [
                        {
                            "index": number * params.n + sample.index,
                            "text": sample.text,
                            "logprobs": logprobs,
                            "finish_reason": sample.finish_reason,
                        }
                    ]
                )
            if with_usage:
                yield chunk([], self._usage(jobs))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _whole(self, body: CompletionBody, params: SamplingParams, jobs: list[_Job]) -> dict[str, Any]:
        choices = []
        for number, job in enumerate(jobs):
            for place, choice in enumerate(job.choices):
                if body.max_tokens == 0:  # only the prompt was wanted; the engine always draws one token
                    choice.text, choice.token_ids, choice.logprobs, choice.finish_reason = "", [], [], "length"
                text, logprobs = choice.text, None
                before = self._prompt_text(job) if body.echo else ""
                if body.logprobs is not None:
                    ids, positions, first = list(choice.token_ids), list[PositionLogprobs | None](choice.logprobs), ""
                    if body.echo:
                        ids, positions = job.prompt_ids + ids, (job.prompt_logprobs or [None]) + positions
                        first = self._server.engine.tokenizer.decode(ids[:1], skip_special=False)
                    logprobs = completion_logprobs(ids, positions, body.logprobs, 0, first_text=first)
                choices.append(
                    {
                        "index": number * params.n + place,
                        "text": before + text,
                        "logprobs": logprobs,
                        "finish_reason": choice.finish_reason,
                    }
                )
        return {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": now(),
            "model": body.model,
            "choices": choices,
            "usage": self._usage(jobs),
        }

    def _prompt_text(self, job: _Job) -> str:
        return job.prompt_text if job.prompt_text is not None else self._server.engine.tokenizer.decode(job.prompt_ids)

    @staticmethod
    def _usage(jobs: list[_Job]) -> dict[str, Any]:
        return usage(
            sum(len(job.prompt_ids) for job in jobs),
            sum(len(choice.token_ids) for job in jobs for choice in job.choices),
            [job.effort for job in jobs],
        )
