"""/v1/chat/completions with OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from served import MODEL, Served, serving

HELLO: Any = [{"role": "user", "content": "Hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("Good day to you.") as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_an_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "Good day to you."
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert len({chunk.id for chunk in chunks}) == 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Good day to you."
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_in_a_stream_comes_last_and_alone(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    whole = client.chat.completions.create(model=MODEL, messages=HELLO)
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])


def test_the_bytes_of_a_stream(served: Served) -> None:
    answer = served.post("/v1/chat/completions", {"model": MODEL, "messages": HELLO, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-2])


def test_many_at_once_with_the_asynchronous_client(served: Served) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as client:

            async def one(number: int) -> str:
                messages: Any = [{"role": "user", "content": f"Hello {number}"}]
                if number % 2:
                    answer = await client.chat.completions.create(model=MODEL, messages=messages)
                    return answer.choices[0].message.content or ""
                stream = await client.chat.completions.create(model=MODEL, messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(24)))

    assert asyncio.run(ask()) == ["Good day to you."] * 24
    served.wait_until_idle()


def test_cached_tokens_are_counted(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "a beginning that is long enough for several blocks of the cache"}]
    for _ in range(2):
        answer = client.chat.completions.create(model=MODEL, messages=messages)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= 16


def test_roles_and_content_parts_reach_the_template(served: Served) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [
        {"role": "developer", "content": "short"},
        {"role": "user", "content": parts},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
    ids = served.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = served.post("/detokenize", {"tokens": ids}).json()["prompt"]
    assert text == (
        "<|bos|>system\nshort<|eos|><|bos|>user\none two<|eos|>"
        '<|bos|>assistant\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><|eos|>'
        "<|bos|>tool\ndone<|eos|><|bos|>assistant\n"
    )


def test_length(client: openai.OpenAI) -> None:
    for options in ({"max_tokens": 3}, {"max_completion_tokens": 3}):
        answer = client.chat.completions.create(model=MODEL, messages=HELLO, **options)  # type: ignore[call-overload]
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize("stop", ["day", ["never", "day"]])
def test_stop_strings(client: openai.OpenAI, stop: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Good ", "stop")


def test_several_samples(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {"Good day to you."}
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model=MODEL, messages=HELLO, n=3, stream=True):
        for part in chunk.choices:
            texts[part.index] += part.delta.content or ""
    assert texts == ["Good day to you."] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    if stream:
        content = []
        for chunk in client.chat.completions.create(**asked, stream=True):
            if chunk.choices[0].logprobs is not None:
                content += chunk.choices[0].logprobs.content or []
    else:
        answer = client.chat.completions.create(**asked)
        content = answer.choices[0].logprobs.content
    assert len(content) == 4
    assert "".join(entry.token for entry in content) == "Good"
    for entry in content:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].token == entry.token
        assert -1 < entry.logprob <= 0
        assert entry.top_logprobs[1].logprob < entry.logprob


def test_a_bias_reaches_the_sampler(client: openai.OpenAI, served: Served) -> None:
    [x] = served.post("/tokenize", {"prompt": "X"}).json()["tokens"]
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, logit_bias={str(x): 100}, max_tokens=3)
    assert answer.choices[0].message.content == "XXX"


def test_every_sampling_field_reaches_the_engine(client: openai.OpenAI, served: Served) -> None:
    served.model.rows.clear()
    client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=1,
        temperature=0.25,
        top_p=0.5,
        seed=7,
        presence_penalty=0.75,
        frequency_penalty=-0.5,
        user="me",
        extra_body={"top_k": 5, "min_p": 0.125, "repetition_penalty": 1.5, "min_tokens": 1, "bad_words": ["~~"]},
    )
    row = served.model.rows[-1]
    assert (row.temperature, row.top_p, row.seed, row.presence_penalty, row.frequency_penalty) == (
        0.25, 0.5, 7, 0.75, -0.5,
    )  # fmt: skip
    assert (row.top_k, row.min_p, row.repetition_penalty) == (5, 0.125, 1.5)


def test_ignore_eos_and_stop_token_ids(client: openai.OpenAI, served: Served) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=40, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    [d] = served.post("/tokenize", {"prompt": "d"}).json()["tokens"]
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"stop_token_ids": [d]})
    assert answer.choices[0].message.content == "Goo"


# ---- structured output ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema(client: openai.OpenAI, stream: bool) -> None:
    schema = WEATHER["function"]["parameters"]
    asked: Any = {
        "model": MODEL,
        "messages": HELLO,
        "response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": schema, "strict": True}},
    }
    if stream:
        parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
        text = "".join(parts)
    else:
        text = client.chat.completions.create(**asked).choices[0].message.content
    jsonschema.validate(json.loads(text), schema)


def test_any_json_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@pytest.mark.parametrize(
    ("structured", "expected"),
    [
        ({"choice": ["up", "down"]}, ("up", "down")),
        ({"regex": "(no){2}"}, ("nono",)),
        ({"grammar": 'start: "ok"'}, ("ok",)),
    ],
)
def test_structured_outputs_as_an_extension(
    client: openai.OpenAI, structured: dict[str, Any], expected: tuple[str, ...]
) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"structured_outputs": structured})
    assert answer.choices[0].message.content in expected


def test_text_is_a_response_format(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, response_format={"type": "text"})
    assert answer.choices[0].message.content == "Good day to you."


# ---- tools ----


@pytest.fixture(scope="module")
def caller() -> Iterator[openai.OpenAI]:
    """A model that calls the tool by itself."""
    with (
        serving(f"Let me look.\n{CALL}") as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_a_tool_call_of_the_models_own(caller: openai.OpenAI) -> None:
    answer = caller.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER])
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Rome", "days": 2}
    # The client's message goes back as it came, with the result behind it.
    messages: Any = [*HELLO, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    assert caller.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER]).choices


def test_a_streamed_tool_call(caller: openai.OpenAI) -> None:
    content, arguments, names, ids = "", "", [], []
    reasons = []
    fragments = 0
    for chunk in caller.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], stream=True):
        [choice] = chunk.choices
        content += choice.delta.content or ""
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or []:
            assert call.index == 0
            assert call.function is not None
            if call.id:
                ids.append(call.id)
                names.append(call.function.name)
            fragments += bool(call.function.arguments)
            arguments += call.function.arguments or ""
    assert content.strip() == "Let me look."
    assert (len(ids), names, reasons[-1]) == (1, ["weather"], "tool_calls")
    assert json.loads(arguments) == {"city": "Rome", "days": 2}
    assert fragments > 5  # as they are written


def test_no_tools_are_looked_for_when_they_are_off(caller: openai.OpenAI) -> None:
    answer = caller.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == f"Let me look.\n{CALL}"
    assert answer.choices[0].finish_reason == "stop"
    assert not answer.choices[0].message.tool_calls


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_forced(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    asked: Any = {"model": MODEL, "messages": HELLO, "tools": [WEATHER], "tool_choice": choice}
    if stream:
        arguments, names = "", []
        for chunk in client.chat.completions.create(**asked, stream=True):
            for call in chunk.choices[0].delta.tool_calls or []:
                names += [call.function.name] if call.function.name else []
                arguments += call.function.arguments or ""
    else:
        calls = client.chat.completions.create(**asked).choices[0].message.tool_calls
        names, arguments = [call.function.name for call in calls], calls[0].function.arguments
    assert names == ["weather"]
    jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])


def test_the_tools_reach_the_template(caller: openai.OpenAI) -> None:
    with_tools = caller.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], max_tokens=1).usage
    without = caller.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=1).usage
    assert with_tools is not None
    assert without is not None
    assert with_tools.prompt_tokens > without.prompt_tokens + 50


def test_parsed_answers(client: openai.OpenAI) -> None:
    """The client's helper for structured output sends a strict schema of its own making."""
    import pydantic

    class Answer(pydantic.BaseModel):
        colour: str
        size: int

    parsed = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Answer)
    assert isinstance(parsed.choices[0].message.parsed, Answer)
