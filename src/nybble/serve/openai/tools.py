"""Tool calls: how a model writes them, and a grammar that makes it write one."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nybble.core.errors import ConfigError
from nybble.core.sampling import StructuredOutputsParams

MAX_TOOLS = 128
MAX_FORCED_CALLS = 16  # that one answer may make where a call is required
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ToolFormat(enum.Enum):
    """How calls stand in the text of a model."""

    HERMES = "hermes"  # <tool_call>{"name": …, "arguments": {…}}</tool_call>, any number of them
    LLAMA3 = "llama3"  # the whole answer is {"name": …, "parameters": {…}}, perhaps after <|python_tag|>
    MISTRAL = "mistral"  # [TOOL_CALLS][{"name": …, "arguments": {…}}, …] or [TOOL_CALLS]name{…}
    JSON = "json"  # the whole answer is {"name": …, "arguments": {…}}, or a list of such

    @property
    def shows_special_tokens(self) -> bool:
        """Whether calls start with a control token: their text is needed, so skip_special_tokens must be off."""
        return self in (ToolFormat.MISTRAL, ToolFormat.LLAMA3)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. parameters: JSON schema of its arguments, None if it takes none.

    Raises:
        ConfigError: the name is not made of 1 to 64 letters, digits, `_`, `.` and `-`.
    """

    name: str
    parameters: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"the tool name {self.name!r:.80} must be 1 to 64 letters, digits, '_', '.' or '-'")


def detect_tool_format(template: str | None) -> ToolFormat:
    """The format that a chat template teaches its model; plain JSON if it teaches none that is known."""
    text = template or ""
    if "[TOOL_CALLS]" in text:
        return ToolFormat.MISTRAL
    if "<tool_call>" in text and "<function=" not in text and "<arg_key>" not in text:  # those write XML inside
        return ToolFormat.HERMES
    if "<|python_tag|>" in text or ("<|start_header_id|>" in text and '"parameters"' in text):
        return ToolFormat.LLAMA3
    return ToolFormat.JSON


def forced_call(
    tools: Sequence[Tool], tool_format: ToolFormat, *, name: str | None = None, parallel: bool = True
) -> StructuredOutputsParams:
    """What makes the answer one call or more, of the named tool or of any, with arguments that keep to its schema.

    parallel: several calls are allowed. Raises ConfigError if there is no such tool, or there are too many.
    """
    chosen = [tool for tool in tools if name is None or tool.name == name]
    if not chosen:
        raise ConfigError("a tool call is required but there are no tools" if name is None else f"no tool is {name!r}")
    if len(chosen) > MAX_TOOLS:
        raise ConfigError(f"there are {len(chosen)} tools, more than {MAX_TOOLS}")
    key = "parameters" if tool_format is ToolFormat.LLAMA3 else "arguments"
    again = MAX_FORCED_CALLS - 1 if parallel else 0
    rules = [_start(tool_format, again), "call: " + " | ".join(f"call_{i}" for i in range(len(chosen)))]
    for i, tool in enumerate(chosen):
        head = f'{{"name": {json.dumps(tool.name)}, "{key}": '
        rules.append(f"call_{i}: {json.dumps(head)} %json {json.dumps(_arguments(tool))} {json.dumps('}')}")
    return StructuredOutputsParams(grammar="\n".join(rules))


def _start(tool_format: ToolFormat, again: int) -> str:
    """again: how many more calls may follow the first one."""
    if tool_format is ToolFormat.HERMES:
        more = rf' ("\n" tagged){{0,{again}}}' if again else ""
        return f"start: tagged{more}\n" + r'tagged: "<tool_call>\n" call "\n</tool_call>"'
    if tool_format is ToolFormat.LLAMA3:
        return "start: call"  # these models were taught one call in an answer
    more = f' (", " call){{0,{again}}}' if again else ""
    listed = f'"[" call{more} "]"'
    if tool_format is ToolFormat.MISTRAL:
        return f"start: {listed}"  # the tag is a control token, which a grammar of text cannot write
    return f"start: call | {listed}" if again else "start: call"


def _arguments(tool: Tool) -> dict[str, Any]:
    """The schema of the arguments, which are always an object."""
    if not tool.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {**tool.parameters, "type": "object"}
