"""The bodies of TGI's API. A field that is not here is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from nybble.serve.openai.schemas import Body, Messages, Texts, ToolSpec

MAX_TOP_TOKENS = 20


class Grammar(Body):
    type: Literal["json", "regex", "json_schema"]
    value: Any


class Parameters(Body):
    """What a request may ask for. None is what TGI does without the field."""

    adapter_id: Annotated[str, Field(min_length=1)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_k: Annotated[int, Field(gt=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    return_full_text: bool | None = None
    stop: Texts | None = None
    truncate: Annotated[int, Field(gt=0)] | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    top_n_tokens: Annotated[int, Field(gt=0, le=MAX_TOP_TOKENS)] | None = None
    grammar: Grammar | None = None


class GenerateBody(Body):
    """stream: only of `/`, which can answer in both ways."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None
    add_special_tokens: bool = True


class ChatTokenizeBody(Body):
    messages: Messages
    model: str | None = None
    tools: Annotated[list[ToolSpec], Field(fail_fast=True)] | None = None
