"""The bodies of Ollama's API. A field that is not here is told in a warning, as Ollama's clients send many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from nybble.serve.errors import ApiError
from nybble.serve.openai.schemas import Body, Texts, Tokens


class Open(Body):
    """Takes what it does not know."""

    model_config = ConfigDict(extra="allow", strict=True)

    def unknown(self, where: str = "") -> Iterator[str]:
        """The names of fields that have no effect."""
        for name in self.model_extra or {}:
            yield f"{where}{name}"


class ModelBody(Open):
    """Which model is meant. name: what older clients call it."""

    model: str | None = None
    name: str | None = None

    @property
    def asked(self) -> str:
        """Raises ApiError if no model is named."""
        asked = self.model or self.name
        if not asked:
            raise ApiError(400, "model is required", param="model")
        return asked


class Generation(ModelBody):
    """What requests that write text have in common."""

    stream: bool | None = None
    format: dict[str, Any] | str | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class GenerateBody(Generation):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: Tokens | None = None
    raw: bool | None = None
    images: list[Any] | None = None


class CalledFunction(Open):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class CalledTool(Open):
    id: str | None = None
    function: CalledFunction


class Message(Open):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: list[Any] | None = None
    tool_calls: Annotated[list[CalledTool], Field(fail_fast=True)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class FunctionSpec(Open):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolSpec(Open):
    type: Literal["function"] = "function"
    function: FunctionSpec


class ChatBody(Generation):
    messages: Annotated[list[Message], Field(fail_fast=True)] | None = None
    tools: Annotated[list[ToolSpec], Field(fail_fast=True)] | None = None


class EmbedBody(ModelBody):
    input: str | Texts | None = None
    truncate: bool | None = None
    dimensions: Annotated[int, Field(ge=0)] | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None


class OldEmbedBody(ModelBody):
    prompt: str | None = None
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None


class ShowBody(ModelBody):
    verbose: bool | None = None
    system: str | None = None
    template: str | None = None
    options: dict[str, Any] | None = None


class StreamedBody(ModelBody):
    """Of pull and push."""

    stream: bool | None = None
    insecure: bool | None = None


class CreateMessage(Open):
    role: str
    content: str


class CreateBody(ModelBody):
    stream: bool | None = None
    from_: str | None = Field(None, alias="from")
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    template: str | None = None
    license: str | Texts | None = None
    system: str | None = None
    parameters: dict[str, Any] | None = None
    messages: Annotated[list[CreateMessage], Field(fail_fast=True)] | None = None
    quantize: str | None = None
    modelfile: str | None = None  # refused: what it names would be files of this machine


class CopyBody(Open):
    source: str
    destination: str
