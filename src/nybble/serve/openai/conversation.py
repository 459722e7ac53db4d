"""From the messages of a chat request to the token ids of its prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nybble.serve.bodies import check_length
from nybble.serve.errors import ApiError
from nybble.serve.openai.job import Server
from nybble.serve.openai.schemas import ChatMessage, ToolSpec
from nybble.tokenizer import render_to_ids

_RESERVED = {
    "messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "chat_template", "tokenize"
}  # fmt: skip


def prompt_ids(
    server: Server,
    messages: Sequence[ChatMessage],
    tools: Sequence[ToolSpec] | None,
    variables: dict[str, Any] | None,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """What the model reads, with what its Modelfile puts before the messages.

    May take a while: call it off the event loop.

    Raises:
        ApiError: the model has no chat template, or a message is not complete.
        TokenizerError: the template refuses the messages.
    """
    engine = server.engine
    if engine.chat_template is None:
        raise ApiError(400, "this model has no chat template, it was not made for chats: use /v1/completions")
    check_length(sum(_num_chars(message) for message in messages), engine.context, "messages")
    given = dict(variables or {})
    reserved = _RESERVED & set(given)
    if reserved:
        raise ApiError(400, f"chat_template_kwargs must not set {min(reserved)}", param="chat_template_kwargs")
    if tools:
        given["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    return render_to_ids(
        engine.chat_template,
        engine.tokenizer,
        server.preset.conversation([as_template_message(message, place) for place, message in enumerate(messages)]),
        add_generation_prompt=add_generation_prompt,
        bos_token_id=engine.prompt_bos_token_id,
        **given,
    )


def _num_chars(message: ChatMessage) -> int:
    content = message.content or ""
    return len(content) if isinstance(content, str) else sum(len(part.text) for part in content)


def as_template_message(message: ChatMessage, place: int) -> dict[str, Any]:
    """A message as chat templates expect it: text in one piece, arguments of calls as objects.

    Raises:
        ApiError: it has neither content nor calls, or the arguments are not JSON.
    """
    where = f"messages.{place}"
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if content is None and not message.tool_calls:
        raise ApiError(400, f"{where} has no content", param=f"{where}.content")
    if message.tool_calls and message.role != "assistant":
        raise ApiError(400, f"{where}: only the assistant makes tool calls", param=f"{where}.tool_calls")
    # The newer name of the system role is not known to templates.
    told: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": content or ""}
    if message.name is not None:
        told["name"] = message.name
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        told["tool_calls"] = []
        for call in message.tool_calls:
            try:
                arguments = json.loads(call.function.arguments or "{}")
            except (ValueError, RecursionError):
                raise ApiError(
                    400, f"{where}: the arguments of {call.function.name} are not JSON", param=f"{where}.tool_calls"
                ) from None
            function = {"name": call.function.name, "arguments": arguments}
            told["tool_calls"].append({"id": call.id, "type": "function", "function": function})
    return told
