"""From the fields of a request to the token ids that the model reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nybble.serve.bodies import check_length
from nybble.serve.errors import ApiError
from nybble.serve.models import Resident
from nybble.serve.ollama.schemas import Message, ToolSpec
from nybble.serve.ollama.thinking import CLOSE, OPEN, can_think
from nybble.serve.ollama.wire import Notes
from nybble.store import GoTemplate, is_go_template
from nybble.tokenizer import ChatTemplate, Tokenizer, render_to_ids
from nybble.tokenizer.chat_prompt import Template

Think = bool | str | None

_TAIL = 16  # tokens at a prompt's end that can hold `<think>`
_TOOLS = re.compile(r"\btools\b")
_GO_TOOLS = re.compile(r"\.Tools\b")
_GO_SUFFIX = re.compile(r"\.Suffix\b")
_SWITCHES = re.compile(r"\b(?:enable_thinking|thinking|IsThinkSet|Think)\b")


def capabilities(template: str | None) -> list[str]:
    """What a model can do as far as its chat template says, in Ollama's words."""
    found = ["completion"]
    if template is not None:
        is_go = is_go_template(template)
        if (_GO_TOOLS if is_go else _TOOLS).search(template):
            found.append("tools")
        if is_go and _GO_SUFFIX.search(template):
            found.append("insert")
        if can_think(template):
            found.append("thinking")
    return found


@lru_cache(maxsize=32)
def _template(source: str, bos_token: str, eos_token: str) -> Template:
    if is_go_template(source):
        return GoTemplate(source)
    return ChatTemplate(source, bos_token=bos_token, eos_token=eos_token)


@dataclass(frozen=True, slots=True)
class Written:
    """A prompt. opened: it ends inside a thought."""

    ids: list[int]
    opened: bool = False


class Writer:
    """Writes prompts for one request. Rendering may take a while: call it off the event loop.

    source: the chat template in use, the request's own before the model's; None: there is none.
    """

    def __init__(self, resident: Resident, name: str, limit: int, *, template: str | None = None) -> None:
        """name: of the model, as asked for. limit: tokens of prompt and answer.

        Raises:
            TokenizerError: the template is not valid.
        """
        engine = resident.server.engine
        self._engine = engine
        self._name = name
        self._limit = limit
        self.tokenizer: Tokenizer = engine.tokenizer
        self.source = template or engine.chat_template_source
        self._template: Template | None = engine.chat_template
        if template:
            self._template = _template(template, self.tokenizer.bos_token or "", self.tokenizer.eos_token or "")

    def require(self, capability: str) -> None:
        """Raises ApiError, in Ollama's words, if the model cannot do that."""
        if capability not in capabilities(self.source):
            raise ApiError(400, f"{self._name!a:.100} does not support {capability}", param=capability)

    def raw(self, prompt: str) -> Written:
        """A text as it is; the names of control tokens in it are those tokens."""
        check_length(len(prompt), self._engine.context, "prompt")
        return self._checked(Written(self.tokenizer.encode(prompt, add_special=True, parse_special=True)))

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        before: Sequence[int] = (),
        think: Think = None,
        tools: Sequence[ToolSpec] = (),
        suffix: str | None = None,
    ) -> Written:
        """Messages as the template writes them, behind the tokens of an earlier conversation.

        Raises:
            ApiError: there is no template, or the context cannot hold it.
            TokenizerError: the template refuses the messages.
        """
        return self._checked(self._conversation(messages, before, think, tools, suffix))

    def newest(
        self, messages: Sequence[Mapping[str, Any]], notes: Notes, *, think: Think, tools: Sequence[ToolSpec]
    ) -> Written:
        """As `conversation`, without as many of the oldest messages as the context cannot hold; `notes` is told.

        System messages and the last one stay.
        """
        droppable = [place for place, message in enumerate(messages[:-1]) if message["role"] != "system"]

        def written(num_dropped: int) -> Written:
            dropped = set(droppable[:num_dropped])
            kept = [message for place, message in enumerate(messages) if place not in dropped]
            return self._conversation(kept, (), think, tools, None)

        num_dropped = _fewest(len(droppable), lambda count: len(written(count).ids) < self._limit)
        if num_dropped:
            notes.truncated = f"the {num_dropped} oldest messages"
        return self._checked(written(num_dropped))

    def _conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        before: Sequence[int],
        think: Think,
        tools: Sequence[ToolSpec],
        suffix: str | None,
    ) -> Written:
        check_length(sum(len(message["content"]) for message in messages), self._engine.context, "messages")
        if any(token_id >= self.tokenizer.vocab_size for token_id in before):
            raise ApiError(400, "context holds numbers that are not token ids of this model", param="context")
        if self._template is None:
            ids = self._without_template(messages)
        else:
            variables: dict[str, Any] = (
                {"tools": [tool.model_dump(exclude_none=True) for tool in tools]} if tools else {}
            )
            if think is not None:
                level = think if isinstance(think, str) else ""
                variables |= {"enable_thinking": bool(think), "thinking": bool(think)}
                variables |= {"think": bool(think), "is_think_set": True, "think_level": level}
            if suffix is not None:
                variables["suffix"] = suffix
            ids = render_to_ids(
                self._template, self.tokenizer, messages, bos_token_id=self._engine.prompt_bos_token_id, **variables
            )
        if before and ids[:1] == [self.tokenizer.bos_token_id]:
            ids = ids[1:]
        return self._as_told([*before, *ids], think)

    def _without_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """What Ollama does for such models, as long as nothing of the messages is lost."""
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise ApiError(400, f"{self._name!a:.100} has no chat template, it was not made for chats: send one prompt")
        return self.tokenizer.encode(messages[0]["content"], add_special=True)

    def _as_told(self, ids: list[int], think: Think) -> Written:
        """With an empty thought where there shall be none and the template has no way to say so."""
        if not can_think(self.source):
            return Written(ids)
        tail = self.tokenizer.decode(ids[-_TAIL:], skip_special=False).rstrip()
        opened = tail.endswith(OPEN)
        if think is False and (opened or not _SWITCHES.search(self.source or "")):
            empty = f"\n{CLOSE}\n\n" if opened else f"{OPEN}\n\n{CLOSE}\n\n"
            return Written([*ids, *self.tokenizer.encode(empty, add_special=False, parse_special=True)])
        return Written(ids, opened)

    def _checked(self, written: Written) -> Written:
        if len(written.ids) >= self._limit:
            raise ApiError(
                400,
                f"the prompt has {len(written.ids)} tokens and the context holds {self._limit}, with the answer: "
                "shorten it",
                code="context_length_exceeded",
            )
        return written


def _fewest(most: int, fits: Callable[[int], bool]) -> int:
    """The smallest number up to `most` that fits; `most` if none does."""
    low, high = 0, most
    if fits(0):
        return 0
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates of both languages expect them.

    Raises:
        ApiError: one has images, or calls of somebody else than the assistant.
    """
    return [_template_message(message, f"messages.{place}") for place, message in enumerate(messages)]


def _template_message(message: Message, where: str) -> dict[str, Any]:
    if message.images:
        raise ApiError(400, f"{where}: images are not supported, the model reads text", param=f"{where}.images")
    if message.tool_calls and message.role != "assistant":
        raise ApiError(400, f"{where}: only the assistant makes tool calls", param=f"{where}.tool_calls")
    role = "system" if message.role == "developer" else message.role
    told: dict[str, Any] = {"role": role, "content": message.content or ""}
    if message.thinking:
        told["thinking"] = told["reasoning_content"] = message.thinking  # the second is what Jinja templates call it
    if message.tool_name is not None:
        told["tool_name"] = told["name"] = message.tool_name
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        told["tool_calls"] = [
            {
                **({} if call.id is None else {"id": call.id}),
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return told
