"""`/api/generate` and `/api/chat`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import Response

from nybble.core.errors import ConfigError
from nybble.core.outputs import CompletionOutput, RequestOutput
from nybble.core.sampling import SamplingParams, StructuredOutputsParams
from nybble.serve.errors import ApiError
from nybble.serve.models import Models, Resident
from nybble.serve.ollama.options import keep_alive_of, read_options
from nybble.serve.ollama.prompt import Think, Writer, Written, capabilities, template_messages
from nybble.serve.ollama.schemas import ChatBody, GenerateBody, Generation
from nybble.serve.ollama.thinking import CLOSE, ThoughtSplitter, thought_then_json
from nybble.serve.ollama.wire import Notes, answer_with, nanoseconds, timestamp
from nybble.serve.openai.job import Chunks
from nybble.serve.openai.logprobs import chat_logprobs
from nybble.serve.openai.params import sampling_params
from nybble.serve.openai.schemas import JsonSchema, ResponseFormat, Sampling
from nybble.serve.openai.tool_parser import CallStart, ContentDelta, ToolParser
from nybble.serve.openai.tools import Tool, detect_tool_format
from nybble.tokenizer import Tokenizer


@dataclass(slots=True)
class _Said:
    """What a part of an answer says."""

    content: str = ""
    thinking: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.thinking or self.calls)


@dataclass(slots=True)
class _Plan:
    """What was asked for, understood."""

    prompt: list[int]
    params: SamplingParams
    splitter: ThoughtSplitter | None
    parser: ToolParser | None
    keeps_context: bool = False  # the last chunk holds the tokens of the conversation

    def read(self, part: CompletionOutput) -> _Said:
        """What new text says, as far as it is certain."""
        said = _Said(part.text)
        ended = part.finish_reason is not None
        if self.splitter is not None:
            said.thinking, said.content = self.splitter.push(part.text)
            if ended:
                thought, answer = self.splitter.flush()
                said.thinking += thought
                said.content += answer
        if self.parser is not None:
            deltas = self.parser.push(said.content)
            deltas = [*deltas, *self.parser.flush()] if ended else deltas
            said.content = ""
            for delta in deltas:
                if isinstance(delta, ContentDelta):
                    said.content += delta.text
                elif isinstance(delta, CallStart):
                    function = {"index": delta.index, "name": delta.name, "arguments": {}}
                    said.calls.append({"id": delta.id, "function": function})
                else:  # the parser gives them in one piece
                    said.calls[-1]["function"]["arguments"] = json.loads(delta.text)
        return said


_Shape = Callable[[_Said], dict[str, Any]]
_Prepare = Callable[[Resident, Notes], _Plan]


def _as_response(said: _Said) -> dict[str, Any]:
    return {"response": said.content, **({"thinking": said.thinking} if said.thinking else {})}


def _as_message(said: _Said) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": said.content}
    if said.thinking:
        message["thinking"] = said.thinking
    if said.calls:
        message["tool_calls"] = said.calls
    return {"message": message}


class Answers:
    """The two routes."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def generate(self, body: GenerateBody, request: Request) -> Response:
        """The continuation of a prompt.

        Raises:
            ApiError, NybbleError: the request cannot be served.
        """
        if body.images:
            raise ApiError(400, "images are not supported, the model reads text", param="images")
        if body.raw and (body.system or body.template or body.context):
            raise ApiError(400, "raw mode does not support template, system, or context", param="raw")
        if body.raw and (body.suffix or body.think):
            raise ApiError(400, "raw mode does not support suffix or think", param="raw")
        if body.truncate:
            raise ApiError(400, "truncate is for chats: a prompt that is too long is an error", param="truncate")
        is_empty = not body.prompt and not body.suffix
        return await self._answer(body, request, _as_response, None if is_empty else _generate_plan(body))

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """The next message of a conversation.

        Raises:
            ApiError, NybbleError: the request cannot be served.
        """
        return await self._answer(body, request, _as_message, _chat_plan(body) if body.messages else None)

    async def _answer(self, body: Generation, request: Request, shape: _Shape, prepare: _Prepare | None) -> Response:
        if body.shift:
            raise ApiError(400, "shift is not supported: an answer ends where the context does", param="shift")
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
        notes = Notes([f"there is no field {name!a:.60}: it has no effect" for name in body.unknown()])
        chunks = self._loading(body, shape, notes) if prepare is None else self._chunks(body, shape, prepare, notes)
        return await answer_with(request, chunks, notes, stream=body.stream is not False)

    def _lease(self, body: Generation) -> AbstractAsyncContextManager[Resident]:
        return self._models.lease(body.asked, keep_alive=keep_alive_of(body.keep_alive))

    async def _loading(self, body: Generation, shape: _Shape, notes: Notes) -> Chunks:
        """A request without a prompt: the model is to be loaded, or no longer to be."""
        reason = "load"
        if keep_alive_of(body.keep_alive) == 0:
            reason = "unload"
            if not await self._models.unload(body.asked):
                await self._models.find(body.asked)  # raises if there is no such model
                if self._models.pinned is not None:
                    notes.warnings.append("this server was started with one model, which stays: stop the server")
        else:
            async with self._lease(body):
                pass
        head = {"model": body.asked, "created_at": timestamp()}
        yield {**head, **shape(_Said()), "done": True, "done_reason": reason}

    async def _chunks(self, body: Generation, shape: _Shape, prepare: _Prepare, notes: Notes) -> Chunks:
        """What the answer says piece by piece; the last chunk says what it took."""
        began = time.monotonic()
        async with self._lease(body) as resident:
            loaded = time.monotonic()
            server = resident.server
            plan = await asyncio.to_thread(prepare, resident, notes)
            told: list[int] = []  # new tokens
            logprobs: list[dict[str, Any]] = []  # of text that is held back
            last: RequestOutput | None = None
            with server.admission.admit(server.cost(len(plan.prompt), plan.params)):
                async with aclosing(server.run(plan.prompt, plan.params)) as stream:
                    async for last in stream:
                        for part in last.outputs:
                            told += part.token_ids
                            if body.logprobs:
                                logprobs += _logprobs(part, body.top_logprobs or 0, server.engine.tokenizer)
                            said = plan.read(part)
                            if said:
                                yield {
                                    "model": body.asked,
                                    "created_at": timestamp(),
                                    **shape(said),
                                    "done": False,
                                    **({"logprobs": logprobs} if logprobs else {}),
                                }
                                logprobs = []
            yield {
                "model": body.asked,
                "created_at": timestamp(),
                **shape(_Said()),
                "done": True,
                "done_reason": last.outputs[0].finish_reason if last is not None else "stop",
                **({"logprobs": logprobs} if logprobs else {}),
                **({"context": [*plan.prompt, *told]} if plan.keeps_context else {}),
                "total_duration": nanoseconds(began, time.monotonic()),
                "load_duration": nanoseconds(began, loaded),
                **_counts(len(plan.prompt), len(told), last),
            }


def _counts(num_prompt_tokens: int, num_new_tokens: int, last: RequestOutput | None) -> dict[str, int]:
    times = last.metrics if last is not None else None
    first = times.first_token_time if times is not None else None
    return {
        "prompt_eval_count": num_prompt_tokens,
        "prompt_eval_duration": 0 if times is None else nanoseconds(times.first_scheduled_time, first),
        "eval_count": num_new_tokens,
        "eval_duration": 0 if times is None else nanoseconds(first, times.finished_time or time.monotonic()),
    }


def _logprobs(part: CompletionOutput, top: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    found = chat_logprobs(part.token_ids, part.logprobs or [], top, tokenizer)["content"]
    for entry in found:
        if not top:
            del entry["top_logprobs"]
    return list(found)


# ---- from bodies to plans ----


def _generate_plan(body: GenerateBody) -> _Prepare:
    def prepare(resident: Resident, notes: Notes) -> _Plan:
        asked = _Asked(body, resident, notes, template=body.template)
        writer = asked.writer
        think = asked.think()
        if body.raw:
            return asked.plan(writer.raw(body.prompt or ""))
        if body.suffix:
            writer.require("insert")
        messages: Sequence[Mapping[str, Any]] = [{"role": "user", "content": body.prompt or ""}]
        if body.system:
            messages = [{"role": "system", "content": body.system}, *messages]
        if not body.context:
            messages = resident.server.preset.conversation(messages)
        written = writer.conversation(messages, before=body.context or (), think=think, suffix=body.suffix or None)
        plan = asked.plan(written, think=think)
        plan.keeps_context = True
        return plan

    return prepare


def _chat_plan(body: ChatBody) -> _Prepare:
    def prepare(resident: Resident, notes: Notes) -> _Plan:
        for place, message in enumerate(body.messages or ()):
            notes.warnings += [f"{name!a:.80} has no effect" for name in message.unknown(f"messages.{place}.")]
        asked = _Asked(body, resident, notes)
        think = asked.think()
        tools = body.tools or []
        if tools:
            asked.writer.require("tools")
        if tools and body.format:
            raise ApiError(400, "format and tools exclude each other: JSON is not a call", param="format")
        messages = resident.server.preset.conversation(template_messages(body.messages or ()))
        if body.truncate:
            written = asked.writer.newest(messages, notes, think=think, tools=tools)
        else:
            written = asked.writer.conversation(messages, think=think, tools=tools)
        try:
            names = [Tool(tool.function.name, tool.function.parameters).name for tool in tools]
        except ConfigError as error:
            raise ApiError(400, str(error), param="tools") from None
        return asked.plan(written, think=think, tool_names=frozenset(names))

    return prepare


class _Asked:
    """One request and the model that it goes to."""

    def __init__(self, body: Generation, resident: Resident, notes: Notes, *, template: str | None = None) -> None:
        self._body = body
        self._server = resident.server
        stored = resident.stored
        self._options = read_options(stored.parameters if stored is not None else {}, body.options, notes.warnings)
        context = resident.server.engine.context
        asked = self._options.num_ctx
        if asked is not None and asked > context and body.options and body.options.get("num_ctx") is not None:
            notes.warnings.append(f"num_ctx is {asked}, but this model was loaded with a context of {context} tokens")
        self._limit = context if asked is None else min(asked, context)
        self.writer = Writer(resident, body.asked, self._limit, template=template)

    def think(self) -> Think:
        """What was asked, where the model can do it."""
        if self._body.think:
            self.writer.require("thinking")
        return self._body.think

    def plan(self, written: Written, *, think: Think = False, tool_names: frozenset[str] = frozenset()) -> _Plan:
        """Raises ApiError if an option or the format cannot be used."""
        splits = think is not False and "thinking" in capabilities(self.writer.source)
        tool_format = detect_tool_format(self.writer.source)
        shown = (splits and self._is_control(CLOSE)) or (tool_names and tool_format.shows_special_tokens)
        response_format = _response_format(self._body.format)
        forced: StructuredOutputsParams | None = None
        if splits and response_format is not None:
            given = self._body.format
            forced = thought_then_json(given if isinstance(given, dict) else {"type": "object"}, opened=written.opened)
        room = self._limit - len(written.ids)
        longest = self._options.num_predict
        params = sampling_params(
            Sampling.model_construct(**self._options.sampling),
            self._server.settings,
            max_tokens=room if longest is None else min(longest, room),
            logprobs=(self._body.top_logprobs or 0) if self._body.logprobs else None,
            response_format=None if forced is not None else response_format,
            forced=forced,
            skip_special_tokens=False if shown else None,
        )
        return _Plan(
            written.ids,
            params,
            ThoughtSplitter(opened=written.opened) if splits else None,
            ToolParser(tool_format, tool_names, stream=False) if tool_names else None,
        )

    def _is_control(self, text: str) -> bool:
        tokenizer = self.writer.tokenizer
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        return len(ids) == 1 and ids[0] in tokenizer.special_token_ids


def _response_format(given: dict[str, Any] | str | None) -> ResponseFormat | None:
    if given is None or given == "":
        return None
    if isinstance(given, dict):
        return ResponseFormat(type="json_schema", json_schema=JsonSchema(name="format", schema=given))
    if given == "json":
        return ResponseFormat(type="json_object")
    raise ApiError(400, f'invalid format: {given!a:.80}; expected "json" or a JSON schema', param="format")
