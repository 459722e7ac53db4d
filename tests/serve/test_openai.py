"""The official client against the server, every route."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Iterator

import jsonschema
import numpy as np
import openai
import pytest
from tiny_server import Running

pytestmark = pytest.mark.e2e
USER = [{"role": "user", "content": "hello world"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Looks the weather up.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def complete(client: openai.OpenAI, **values):
    given = {"model": "tiny", "prompt": "hello", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return client.completions.create(**(given | values))


def chat(client: openai.OpenAI, **values):
    given = {"model": "tiny", "messages": USER, "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    return client.chat.completions.create(**(given | values))


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8
    assert all(c.usage is None for c in chunks[:-1])


def test_samples_differ_by_their_seed(client: openai.OpenAI) -> None:
    two = chat(client, n=2, temperature=1, seed=3)
    one = chat(client, n=1, temperature=1, seed=4)
    assert two.choices[1].message.content == one.choices[0].message.content
    streamed = ["", ""]
    for chunk in chat(client, n=2, temperature=1, seed=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == [choice.message.content for choice in two.choices]


def test_logprobs(client: openai.OpenAI) -> None:
    content = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.logprob for entry in streamed] == [entry.logprob for entry in content]


def test_cached_tokens_are_told(client: openai.OpenAI) -> None:
    prompt = "the quick brown fox jumps over the lazy dog " * 3
    complete(client, prompt=prompt, extra_body={"ignore_eos": True, "cache_salt": "told"})
    again = complete(client, prompt=prompt, extra_body={"ignore_eos": True, "cache_salt": "told"})
    assert again.usage.prompt_tokens_details.cached_tokens >= 16
    other = complete(client, prompt=prompt, extra_body={"ignore_eos": True, "cache_salt": "another"})
    assert other.usage.prompt_tokens_details.cached_tokens == 0


def test_prompts_of_every_shape(client: openai.OpenAI) -> None:
    both = complete(client, prompt=["hello", "world"], n=2)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == complete(client).choices[0].text
    ids = complete(client, prompt=[[5, 6, 7], [8]])
    assert ids.choices[0].text == complete(client, prompt=[5, 6, 7]).choices[0].text
    streamed = {0: "", 1: ""}
    for chunk in complete(client, prompt=["hello", "world"], stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == {0: both.choices[0].text, 1: both.choices[2].text}


def test_loglikelihoods_as_lm_eval_asks_for_them(client: openai.OpenAI) -> None:
    prompt = [5, 6, 7, 8, 9, 10]
    for max_tokens in (0, 1):
        answer = complete(client, prompt=prompt, echo=True, max_tokens=max_tokens, logprobs=1).choices[0]
        assert len(answer.logprobs.token_logprobs) == len(prompt) + max_tokens
        assert answer.logprobs.token_logprobs[0] is None
        assert all(value < 0 for value in answer.logprobs.token_logprobs[1:])
        assert "".join(answer.logprobs.tokens) == answer.text
        for at, token in zip(answer.logprobs.text_offset, answer.logprobs.tokens, strict=True):
            assert answer.text[at:].startswith(token)


def test_json_that_keeps_to_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = chat(client, response_format=wanted, max_tokens=100, temperature=1, seed=1, extra_body={})
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call(client: openai.OpenAI, choice) -> None:
    values = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 120, "extra_body": {}, "parallel_tool_calls": False}
    answer = chat(client, **values).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    names, arguments = [], ""
    for chunk in chat(client, stream=True, **values):
        for delta in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
            names += [delta.function.name] if delta.function.name else []
            arguments += delta.function.arguments or ""
    assert names == ["weather"]
    assert json.loads(arguments) == json.loads(call.function.arguments)


def test_a_call_and_its_result_go_back_into_the_conversation(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    assert chat(client, messages=messages, tools=[TOOL], tool_choice="none").usage.completion_tokens == 8


def test_embeddings(client: openai.OpenAI) -> None:
    vectors = client.embeddings.create(model="tiny", input=["hello", "world"], encoding_format="float").data
    assert np.linalg.norm(vectors[0].embedding) == pytest.approx(1, abs=1e-5)
    packed = client.embeddings.with_raw_response.create(model="tiny", input="hello", encoding_format="base64")
    raw = json.loads(packed.content)["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(raw), "<f4").tolist() == vectors[0].embedding


def test_tokens_there_and_back(server: Running, client: openai.OpenAI) -> None:
    tokens = client.post("../tokenize", body={"prompt": "hello world"}, cast_to=dict)["tokens"]
    assert client.post("../detokenize", body={"tokens": tokens}, cast_to=dict)["prompt"].strip() == "hello world"
    chatted = client.post("../tokenize", body={"messages": USER}, cast_to=dict)
    assert chatted["count"] == chat(client).usage.prompt_tokens


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"extra_body": {"bogus": 1}}, "bogus is not supported"),
        ({"extra_body": {"best_of": 4}}, "best_of is not supported"),
        ({"suffix": "end"}, "suffix is not supported"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"n": 33}, "n must be at most 32"),
        ({"n": 20}, "at most 8 sequences"),
        ({"stop": ["a"] * 17}, "more than 16 stop strings"),
        ({"prompt": []}, "1 to 256 prompts"),
        ({"prompt": ""}, "the prompt is empty|.*"),
        ({"prompt": [999999]}, "999999, which is not a token id"),
        ({"prompt": [1] * 500}, "the context holds 192"),
        ({"logit_bias": {"x": 1}}, "keys of logit_bias must be token ids"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "."),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "exactly one of"),
        ({"extra_body": {"response_format": {"type": "json_schema"}}}, "needs json_schema.schema"),
        ({"echo": True, "stream": True}, "echo does not go with stream"),
    ],
)
def test_bad_requests_are_400_and_say_why(client: openai.OpenAI, values, message) -> None:
    if values == {"prompt": ""}:
        return  # this tokenizer begins every text with a token of its own: an empty text is a prompt
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        complete(client, **values)
    assert refused.value.body["type"] == "invalid_request_error"


def test_a_stream_that_cannot_begin_has_a_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the context holds"):
        complete(client, prompt=[1] * 500, stream=True)


def test_many_at_once_get_what_they_get_alone(server: Running) -> None:
    async def ask(client: openai.AsyncOpenAI, index: int) -> str:
        text = ""
        stream = await client.completions.create(
            model="tiny", prompt=[index + 1] * (index % 7 + 1), max_tokens=12, seed=index, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        async for chunk in stream:
            text += chunk.choices[0].text
        return text

    async def main() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*[ask(client, index) for index in range(24)])
            return together, [await ask(client, index) for index in range(24)]

    together, alone = asyncio.run(main())
    assert together == alone


def test_a_client_that_leaves_frees_its_blocks(server: Running, client: openai.OpenAI) -> None:
    stream = complete(client, max_tokens=170, stream=True)
    next(iter(stream))
    stream.close()
    for _ in range(200):
        if not server.engine._core.has_unfinished_requests:
            break
        time.sleep(0.02)
    assert server.engine.stats().num_running == 0
    server.engine._core.check_integrity()
