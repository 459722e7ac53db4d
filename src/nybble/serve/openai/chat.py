"""`/v1/chat/completions`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from nybble.core.errors import ConfigError
from nybble.core.outputs import CompletionOutput, PositionLogprobs
from nybble.core.sampling import SamplingParams, StructuredOutputsParams
from nybble.serve.errors import ApiError
from nybble.serve.openai.conversation import prompt_ids
from nybble.serve.openai.job import Effort, Server, event_stream, new_id, now, unless_disconnected, usage
from nybble.serve.openai.logprobs import chat_logprobs
from nybble.serve.openai.params import sampling_params
from nybble.serve.openai.schemas import ChatBody, NamedTool
from nybble.serve.openai.tool_parser import (
    ArgumentsDelta,
    CallStart,
    ContentDelta,
    ToolCall,
    ToolDelta,
    ToolParser,
    parse_tool_calls,
)
from nybble.serve.openai.tools import Tool, ToolFormat, detect_tool_format, forced_call


@dataclass(slots=True)
class _Plan:
    """What was asked for, understood."""

    body: ChatBody
    prompt: list[int]
    params: SamplingParams
    tool_format: ToolFormat
    tool_names: frozenset[str]  # empty: calls are not looked for
    parallel: bool

    def parser(self) -> ToolParser | None:
        """For one streamed sample."""
        if not self.tool_names:
            return None
        return ToolParser(self.tool_format, self.tool_names, parallel=self.parallel, stream=True)


@dataclass(slots=True)
class _Sample:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: str | None = None


class Chat:
    """The route."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def answer(self, body: ChatBody, request: Request) -> Response:
        """A whole answer, or a stream of server-sent events.

        Raises:
            ApiError, NybbleError: the request cannot be served.
        """
        server = self._server
        plan = await asyncio.to_thread(self._plan, body)
        with ExitStack() as admitted:
            admitted.enter_context(server.admission.admit(server.cost(len(plan.prompt), plan.params)))
            if body.stream:
                return await event_stream(request, self._chunks(plan), admitted)
            return JSONResponse(await unless_disconnected(request, self._whole(plan)))

    def _plan(self, body: ChatBody) -> _Plan:
        choice = body.tool_choice or ("auto" if body.tools else "none")
        if choice != "none" and not body.tools:
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
        specs = (body.tools or []) if choice != "none" else []
        try:
            tools = [Tool(spec.function.name, spec.function.parameters) for spec in specs]
        except ConfigError as error:
            raise ApiError(400, str(error), param="tools") from None
        tool_format = detect_tool_format(self._server.engine.chat_template_source)
        parallel = body.parallel_tool_calls is not False
        forced: StructuredOutputsParams | None = None
        if isinstance(choice, NamedTool):
            forced = forced_call(tools, tool_format, name=choice.function.name, parallel=False)
        elif choice == "required":
            forced = forced_call(tools, tool_format, parallel=parallel)
        if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
            raise ApiError(
                400,
                "max_completion_tokens is the newer name of max_tokens: give one of them",
                param="max_completion_tokens",
            )
        preset = self._server.preset
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        params = sampling_params(
            body,
            self._server.settings,
            max_tokens=limit if limit is not None else preset.max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            response_format=body.response_format,
            forced=forced,
            skip_special_tokens=False if tools and tool_format.shows_special_tokens else None,
            preset=preset.sampling,
        )
        prompt = prompt_ids(self._server, body.messages, specs, body.chat_template_kwargs)
        return _Plan(body, prompt, params, tool_format, frozenset(tool.name for tool in tools), parallel)

    def _run(self, plan: _Plan) -> Any:
        body = plan.body
        return self._server.run(plan.prompt, plan.params, priority=body.priority, cache_salt=body.cache_salt)

    # ---- a whole answer ----

    async def _whole(self, plan: _Plan) -> dict[str, Any]:
        samples = [_Sample() for _ in range(plan.params.n)]
        effort = Effort()
        async with aclosing(self._run(plan)) as stream:
            async for output in stream:
                effort.see(output)
                for part in output.outputs:
                    sample = samples[part.index]
                    sample.text += part.text
                    sample.token_ids += part.token_ids
                    sample.logprobs += part.logprobs or []
                    sample.finish_reason = part.finish_reason
        return {
            "id": new_id("chatcmpl"),
            "object": "chat.completion",
            "created": now(),
            "model": plan.body.model,
            "choices": [self._choice(plan, index, sample) for index, sample in enumerate(samples)],
            "usage": usage(len(plan.prompt), sum(len(s.token_ids) for s in samples), [effort]),
            "system_fingerprint": None,
        }

    def _choice(self, plan: _Plan, index: int, sample: _Sample) -> dict[str, Any]:
        content, calls = sample.text, list[ToolCall]()
        if plan.tool_names:
            content, calls = parse_tool_calls(sample.text, plan.tool_format, plan.tool_names, parallel=plan.parallel)
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        reason = "tool_calls" if calls and sample.finish_reason == "stop" else sample.finish_reason
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(plan, sample.token_ids, sample.logprobs),
            "finish_reason": reason,
        }

    def _logprobs(
        self, plan: _Plan, token_ids: list[int], positions: list[PositionLogprobs] | None
    ) -> dict[str, Any] | None:
        if not plan.body.logprobs:
            return None
        return chat_logprobs(token_ids, positions or [], plan.body.top_logprobs or 0, self._server.engine.tokenizer)

    # ---- a stream ----

    async def _chunks(self, plan: _Plan) -> AsyncGenerator[dict[str, Any], None]:
        body = plan.body
        chat_id, created = new_id("chatcmpl"), now()
        with_usage = body.stream_options is not None and body.stream_options.include_usage

        def chunk(choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> dict[str, Any]:
            head = {"id": chat_id, "object": "chat.completion.chunk", "created": created, "model": body.model}
            return {**head, "choices": choices, **({"usage": used} if with_usage else {})}

        def choice(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
            return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}

        parsers = [plan.parser() for _ in range(plan.params.n)]
        called = [False] * plan.params.n
        begun = False
        num_new, effort = 0, Effort()
        async with aclosing(self._run(plan)) as stream:
            async for output in stream:
                if not begun:  # not before the request is under way: until then an error has a status of its own
                    begun = True
                    for index in range(plan.params.n):
                        yield chunk([choice(index, {"role": "assistant", "content": ""})])
                effort.see(output)
                for part in output.outputs:
                    num_new += len(part.token_ids)
                    deltas = _deltas(parsers[part.index], part)
                    called[part.index] |= any("tool_calls" in delta for delta in deltas)
                    logprobs = self._logprobs(plan, part.token_ids, part.logprobs)
                    for place, delta in enumerate(deltas):
                        yield chunk([choice(part.index, delta, logprobs=logprobs if place == 0 else None)])
                    if not deltas and logprobs is not None and part.token_ids:
                        yield chunk([choice(part.index, {"content": ""}, logprobs=logprobs)])
                    if part.finish_reason is not None:
                        ended = (
                            "tool_calls" if called[part.index] and part.finish_reason == "stop" else part.finish_reason
                        )
                        yield chunk([choice(part.index, {}, finish_reason=ended)])
        if with_usage:
            yield chunk([], usage(len(plan.prompt), num_new, [effort]))


def _deltas(parser: ToolParser | None, part: CompletionOutput) -> list[dict[str, Any]]:
    """What a part of a sample says to the client."""
    if parser is None:
        return [{"content": part.text}] if part.text else []
    found = parser.push(part.text)
    if part.finish_reason is not None:
        found = [*found, *parser.flush()]
    return [_as_json(delta) for delta in found]


def _as_json(delta: ToolDelta) -> dict[str, Any]:
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    if isinstance(delta, CallStart):
        function = {"name": delta.name, "arguments": ""}
        return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}
    assert isinstance(delta, ArgumentsDelta)
    return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
