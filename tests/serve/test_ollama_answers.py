"""Text through Ollama's API, asked for by Ollama's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import pytest
from ollama import AsyncClient, Client, ResponseError
from ollama_served import OPENS, PLAIN, THINKS, TOOLS, OllamaServed, ollama
from served import CONTEXT, EOS, wait_for

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>'
HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaServed]:
    with ollama(tmp_path_factory.mktemp("store")) as made:
        yield made


@pytest.fixture(scope="module")
def one_client(server: OllamaServed) -> Iterator[Client]:
    with Client(server.url) as made:
        yield made


@pytest.fixture
def client(server: OllamaServed, one_client: Client) -> Iterator[Client]:
    server.says("Hello")
    yield one_client
    server.wait_until_idle()


# ---- generate ----


def test_generate(server: OllamaServed, client: Client) -> None:
    answer = client.generate("tiny", "Hi")
    assert answer.response == "Hello" and answer.done and answer.done_reason == "stop" and answer.model == "tiny"
    assert server.prompt() == "<|bos|>user\nHi<|eos|><|bos|>assistant\n"
    assert answer.prompt_eval_count == len(server.model.prompts[-1])
    assert answer.eval_count == 5  # with the end
    for name in ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration"):
        assert isinstance(answer[name], int) and answer[name] >= 0
    assert answer.total_duration > answer.eval_duration > 0
    assert answer.created_at is not None and answer.created_at.endswith("Z")


def test_generate_streams(client: Client) -> None:
    *parts, last = client.generate("tiny", "Hi", stream=True)
    assert "".join(part.response or "" for part in parts) == "Hello"
    assert len(parts) > 1 and not any(part.done for part in parts)
    assert last.done and last.response == "" and last.done_reason == "stop" and last.eval_count == 5


def test_streaming_is_the_default(server: OllamaServed, client: Client) -> None:
    answer = server.post("/api/generate", {"model": "tiny", "prompt": "Hi"})
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]


def test_system_and_template(server: OllamaServed, client: Client) -> None:
    client.generate("tiny", "Hi", system="Be brief.")
    assert server.prompt() == "<|bos|>system\nBe brief.<|eos|><|bos|>user\nHi<|eos|><|bos|>assistant\n"
    client.generate("tiny", "Hi", system="Be brief.", template="{{ .System }}: {{ .Prompt }} ->")
    assert server.prompt() == "Be brief.: Hi ->"
    with pytest.raises(ResponseError, match="template") as refused:
        client.generate("tiny", "Hi", template="{{ if }}")
    assert refused.value.status_code == 400


def test_raw(server: OllamaServed, client: Client) -> None:
    client.generate("tiny", "as <|eos|> it is", raw=True)
    assert server.prompt() == "as <|eos|> it is"
    assert EOS in server.model.prompts[-1]
    for more in ({"system": "x"}, {"template": "x"}, {"context": [1]}):
        with pytest.raises(ResponseError, match="raw mode does not support template, system, or context"):
            client.generate("tiny", "Hi", raw=True, **more)


def test_context_goes_on(server: OllamaServed, client: Client) -> None:
    first = client.generate("tiny", "Hi")
    assert first.context is not None
    second = client.generate("tiny", "More", context=first.context)
    assert server.prompt() == (
        "<|bos|>user\nHi<|eos|><|bos|>assistant\nHello<|eos|><|bos|>user\nMore<|eos|><|bos|>assistant\n"
    ).replace("<|bos|>user\nMore", "user\nMore")
    assert second.context is not None and second.context[: len(first.context)] == list(first.context)
    assert client.generate("tiny", "Hi", raw=True).context is None
    with pytest.raises(ResponseError, match="token ids"):
        client.generate("tiny", "Hi", context=[10**9])


def test_suffix_needs_a_template_that_knows_it(server: OllamaServed, client: Client) -> None:
    with pytest.raises(ResponseError, match="does not support insert"):
        client.generate("tiny", "def f(", suffix="return 1")
    template = "<PRE>{{ .Prompt }}<SUF>{{ .Suffix }}<MID>"
    client.generate("tiny", "def f(", suffix="return 1", template=template)
    assert server.prompt() == "<PRE>def f(<SUF>return 1<MID>"


def test_images_are_refused(client: Client) -> None:
    with pytest.raises(ResponseError, match="images are not supported"):
        client.generate("tiny", "Hi", images=["aGk="])
    with pytest.raises(ResponseError, match="images are not supported"):
        client.chat("tiny", [{"role": "user", "content": "Hi", "images": ["aGk="]}])


def test_load_and_unload(server: OllamaServed, client: Client) -> None:
    assert client.generate("tiny").done_reason == "load"
    assert [model.model for model in client.ps().models] == ["tiny:latest"]
    assert client.chat("tiny", keep_alive="10m").done_reason == "load"
    assert server.kept[-1] == 600
    assert client.generate("tiny", keep_alive=0).done_reason == "unload"
    assert client.ps().models == []
    with pytest.raises(ResponseError) as unknown:
        client.generate("nobody", keep_alive=0)
    assert unknown.value.status_code == 404


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (5, 5),
        (2.5, 2.5),
        (-1, -1),
        ("5m", 300),
        ("1h30m", 5400),
        ("-1", -1),
        ("-1m", -60),
        ("1.5s", 1.5),
        ("300ms", 0.3),
    ],
)
def test_keep_alive(server: OllamaServed, client: Client, given: float | str, seconds: float) -> None:
    client.generate("tiny", "Hi", keep_alive=given)
    assert server.kept[-1] == pytest.approx(seconds)


@pytest.mark.parametrize("given", ["soon", "5 minutes", "", "m", "1" * 100, "5x"])
def test_what_is_no_duration_is_refused(client: Client, given: str) -> None:
    with pytest.raises(ResponseError, match="is not a duration") as refused:
        client.generate("tiny", "Hi", keep_alive=given)
    assert refused.value.status_code == 400


# ---- chat ----


def test_chat(server: OllamaServed, client: Client) -> None:
    answer = client.chat("tiny", [{"role": "system", "content": "S"}, *HELLO])
    assert answer.message.role == "assistant" and answer.message.content == "Hello"
    assert answer.done_reason == "stop" and answer.eval_count == 5
    assert server.prompt() == "<|bos|>system\nS<|eos|><|bos|>user\nHi<|eos|><|bos|>assistant\n"
    *parts, last = client.chat("tiny", HELLO, stream=True)
    assert "".join(part.message.content or "" for part in parts) == "Hello"
    assert last.done and last.message.content == ""


def test_the_asynchronous_client(server: OllamaServed, client: Client) -> None:
    async def ask() -> tuple[str | None, str]:
        async with AsyncClient(server.url) as asynchronous:
            whole = await asynchronous.chat("tiny", HELLO)
            parts = [part async for part in await asynchronous.generate("tiny", "Hi", stream=True)]
            await asynchronous.embed("tiny", "Hi")
            await asynchronous.list()
            await asynchronous.ps()
            return whole.message.content, "".join(part.response or "" for part in parts)

    assert asyncio.run(ask()) == ("Hello", "Hello")


def test_tools(server: OllamaServed, client: Client) -> None:
    server.says(f"I look. {CALL}", TOOLS)
    answer = client.chat("tiny", HELLO, tools=[WEATHER])
    assert answer.message.content == "I look."
    assert answer.message.tool_calls is not None
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather" and call.function.arguments == {"city": "Rome"}
    assert answer.done_reason == "stop"
    assert '"description": "The weather of a city."' in server.prompt()


def test_tools_stream_and_results_go_back(server: OllamaServed, client: Client) -> None:
    server.says(CALL + "\n" + CALL.replace("Rome", "Oslo"), TOOLS)
    parts = list(client.chat("tiny", HELLO, tools=[WEATHER], stream=True))
    calls = [call for part in parts for call in part.message.tool_calls or []]
    assert [call.function.arguments for call in calls] == [{"city": "Rome"}, {"city": "Oslo"}]
    server.says("Fine.", TOOLS)
    turns = [
        *HELLO,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
        },
        {"role": "tool", "content": "sunny", "tool_name": "weather"},
    ]
    assert client.chat("tiny", turns).message.content == "Fine."
    assert "<|bos|>tool\nsunny" in server.prompt() and '"arguments": {"city": "Rome"}' in server.prompt()


def test_functions_are_tools(server: OllamaServed, client: Client) -> None:
    def weather(city: str) -> str:
        """The weather.

        Args:
            city: where
        """
        return city

    server.says(CALL, TOOLS)
    answer = client.chat("tiny", HELLO, tools=[weather])
    assert answer.message.tool_calls is not None and answer.message.tool_calls[0].function.name == "weather"


def test_a_template_without_tools_refuses_them(client: Client) -> None:
    with pytest.raises(ResponseError, match="does not support tools") as refused:
        client.chat("tiny", HELLO, tools=[WEATHER])
    assert refused.value.status_code == 400


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "name": {"enum": ["Ann"]}},
    "required": ["age", "name"],
    "additionalProperties": False,
}


def test_format(server: OllamaServed, client: Client) -> None:
    server.says(None)
    text = client.chat("tiny", HELLO, format=SCHEMA, options={"num_predict": 200}).message.content
    jsonschema.validate(json.loads(text or ""), SCHEMA)
    text = client.generate("tiny", "Hi", format="json", options={"num_predict": 200}).response
    assert isinstance(json.loads(text), dict)
    answer = server.post("/api/generate", {"model": "tiny", "prompt": "Hi", "format": "yaml"})
    assert answer.status_code == 400 and "invalid format" in answer.json()["error"]
    answer = server.post("/api/generate", {"model": "tiny", "prompt": "Hi", "format": {"type": "nothing"}})
    assert answer.status_code == 400


# ---- thinking ----


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("template", "script"),
    [(THINKS, "<think>\nLet me see.\n</think>\n\nHello"), (OPENS, "Let me see.\n</think>\n\nHello")],
)
@pytest.mark.parametrize("think", [True, None])
def test_thoughts_are_split(
    server: OllamaServed, client: Client, template: str, script: str, stream: bool, think: bool | None
) -> None:
    server.says(script, template)
    if stream:
        parts = list(client.chat("tiny", HELLO, think=think, stream=True))
        thought = "".join(part.message.thinking or "" for part in parts)
        content = "".join(part.message.content or "" for part in parts)
    else:
        answer = client.chat("tiny", HELLO, think=think)
        thought, content = answer.message.thinking or "", answer.message.content or ""
    assert (thought, content) == ("Let me see.", "Hello")


def test_generate_thinks(server: OllamaServed, client: Client) -> None:
    server.says("<think>Hm.</think>Hello", THINKS)
    answer = client.generate("tiny", "Hi", think="high")
    assert (answer.thinking, answer.response) == ("Hm.", "Hello")


def test_no_thoughts(server: OllamaServed, client: Client) -> None:
    server.says("Hello", THINKS)
    assert client.chat("tiny", HELLO, think=False).message.content == "Hello"
    assert server.prompt().endswith("assistant\n<think>\n\n</think>\n\n")
    server.says("Hello", OPENS)
    assert client.chat("tiny", HELLO, think=False).message.content == "Hello"
    assert server.prompt().endswith("assistant\n<think>\n\n</think>\n\n")
    server.says("Hello", PLAIN)
    with pytest.raises(ResponseError, match="does not support thinking") as refused:
        client.chat("tiny", HELLO, think=True)
    assert refused.value.status_code == 400


def test_thoughts_before_json(server: OllamaServed, client: Client) -> None:
    server.says("Hm, so.</think>", OPENS)
    server.model.script = server.model.script and server.model.script[:-1]
    answer = client.chat("tiny", HELLO, format=SCHEMA, options={"num_predict": 200})
    assert answer.message.thinking == "Hm, so."
    jsonschema.validate(json.loads(answer.message.content or ""), SCHEMA)


# ---- options ----


def test_defaults_are_ollamas(server: OllamaServed, client: Client) -> None:
    client.generate("tiny", "Hi")
    row = server.model.rows[-1]
    assert (row.temperature, row.top_k, row.top_p) == (pytest.approx(0.8), 40, pytest.approx(0.9))


def test_options(server: OllamaServed, client: Client) -> None:
    options = {"temperature": 0.1, "top_k": 3.0, "top_p": 0.5, "num_predict": 2, "seed": 7, "min_p": 0.1}
    answer = client.generate("tiny", "Hi", options=options)
    row = server.model.rows[-1]
    assert (row.temperature, row.top_k, row.top_p) == (pytest.approx(0.1), 3, pytest.approx(0.5))
    assert answer.done_reason == "length" and answer.eval_count == 2
    assert client.generate("tiny", "Hi", options={"stop": ["l"]}).response == "He"
    assert client.generate("tiny", "Hi", options={"stop": "lo"}).response == "Hel"


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"colour": 1}, "colour"),
        ({"num_gpu": 99}, "num_gpu"),
        ({"mirostat": 2}, "mirostat"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"repeat_penalty": 1.3}, "repeat_penalty looks at the whole text"),
        ({"num_ctx": 10**6}, f"loaded with a context of {CONTEXT}"),
        ({"a\r\nSet-Cookie: x": 1, "é": 2}, "Set-Cookie"),
    ],
)
def test_what_has_no_effect_warns(server: OllamaServed, client: Client, options: dict[str, Any], warned: str) -> None:
    for stream in (False, True):
        answer = server.post("/api/generate", {"model": "tiny", "prompt": "Hi", "options": options, "stream": stream})
        assert answer.status_code == 200 and warned in answer.headers["x-nybble-warning"]
        assert "set-cookie" not in answer.headers
    assert "x-nybble-warning" not in server.post("/api/generate", {"model": "tiny", "prompt": "Hi"}).headers


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"top_k": 1.5},
        {"num_predict": True},
        {"repeat_penalty": 0},
        {"presence_penalty": 9},
        {"stop": [""]},
        {"stop": [1]},
        {"stop": ["x"] * 17},
        {"seed": 2**70},
        {"temperature": 10**400},
        {"min_p": 2},
    ],
)
def test_wrong_options_are_refused(server: OllamaServed, client: Client, options: dict[str, Any]) -> None:
    answer = server.post("/api/generate", {"model": "tiny", "prompt": "Hi", "options": options})
    assert answer.status_code == 400, answer.text
    assert next(iter(options)).replace("repeat", "repe") in answer.json()["error"].replace("repeat", "repe")


def test_an_unknown_field_warns(server: OllamaServed, client: Client) -> None:
    answer = server.post("/api/chat", {"model": "tiny", "messages": [{**HELLO[0], "mood": 1}], "fast": True})
    assert answer.status_code == 200
    assert "fast" in answer.headers["x-nybble-warning"] and "messages.0.mood" in answer.headers["x-nybble-warning"]


def test_too_long_is_an_error(server: OllamaServed, client: Client) -> None:
    with pytest.raises(ResponseError, match="the context holds 512") as refused:
        client.generate("tiny", "x" * 600)
    assert refused.value.status_code == 400
    with pytest.raises(ResponseError, match="the context holds 20"):
        client.generate("tiny", "x" * 30, options={"num_ctx": 20})
    assert client.generate("tiny", "x", options={"num_ctx": 22, "num_predict": -1}).done_reason in ("stop", "length")


def test_an_answer_ends_where_num_ctx_does(server: OllamaServed, client: Client) -> None:
    server.says("y" * 100)
    prompt = client.generate("tiny", "x", options={"num_predict": 1}).prompt_eval_count or 0
    answer = client.generate("tiny", "x", options={"num_ctx": prompt + 7})
    assert answer.done_reason == "length" and answer.eval_count == 7


def test_truncation_is_announced(server: OllamaServed, client: Client) -> None:
    turns = [{"role": "system", "content": "S"}, *({"role": "user", "content": f"{n}" * 60} for n in range(12))]
    body = {"model": "tiny", "messages": turns, "stream": False}
    assert server.post("/api/chat", body).status_code == 400
    answer = server.post("/api/chat", {**body, "truncate": True})
    assert answer.status_code == 200 and "oldest messages" in answer.headers["x-context-truncated"]
    assert server.prompt().startswith("<|bos|>system\nS<|eos|>") and "11" * 30 in server.prompt()
    assert "0" * 60 not in server.prompt()
    for path, more in (("/api/generate", {"truncate": True, "prompt": "x"}), ("/api/chat", {"shift": True})):
        refused = server.post(path, {**body, **more})
        assert refused.status_code == 400 and next(iter(more)) in refused.json()["error"]


def test_logprobs(client: Client) -> None:
    answer = client.generate("tiny", "Hi", logprobs=True, top_logprobs=2)
    assert answer.logprobs is not None and len(answer.logprobs) == 5
    assert answer.logprobs[0].token == "H" and len(answer.logprobs[0].top_logprobs or []) == 2
    parts = list(client.chat("tiny", HELLO, logprobs=True, stream=True))
    assert sum(len(part.logprobs or []) for part in parts) == 5


# ---- embeddings ----


def test_embed(server: OllamaServed, client: Client) -> None:
    one = client.embed("tiny", "Hi")
    many = client.embed("tiny", ["Hi", "Ho"])
    assert len(one.embeddings) == 1 and len(many.embeddings) == 2
    assert list(one.embeddings[0]) == pytest.approx(list(many.embeddings[0]))
    assert one.prompt_eval_count and one.total_duration
    assert client.embed("tiny", "").embeddings == []
    short = client.embed("tiny", "Hi", dimensions=2).embeddings[0]
    assert len(short) == 2 and sum(value**2 for value in short) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ResponseError, match="dimensions must be at most"):
        client.embed("tiny", "Hi", dimensions=10**6)
    assert list(client.embeddings("tiny", "Hi").embedding) == pytest.approx(list(one.embeddings[0]))


@pytest.mark.parametrize("place", [0, 1])
def test_embed_truncates_and_says_so(server: OllamaServed, client: Client, place: int) -> None:
    """The long text fills a step: behind the short one it is read in two pieces."""
    texts = ["x" * 600, "y"] if place == 0 else ["y", "x" * 600]
    answer = server.post("/api/embed", {"model": "tiny", "input": texts})
    assert answer.status_code == 200 and f"88 tokens of input {place}" in answer.headers["x-context-truncated"]
    with pytest.raises(ResponseError, match="the context holds"):
        client.embed("tiny", "x" * 600, truncate=False)
    with pytest.raises(ResponseError, match="the context holds"):
        client.embeddings("tiny", "x" * 600)


# ---- clients that leave, engines that fail ----


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_blocks(server: OllamaServed, client: Client, path: str, stream: bool) -> None:
    server.says("x" * 300)
    server.model.delay = 0.02
    body = {"model": "tiny", "prompt": "Hi", "messages": HELLO, "stream": stream}
    if path == "/api/chat":
        del body["prompt"]
    try:
        if stream:
            with httpx.stream("POST", server.url + path, json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(server.url + path, json=body, timeout=0.3)
        wait_for(lambda: server.engine.stats().num_running == 0, 3)
    finally:
        server.model.delay = 0.0
    server.wait_until_idle()


def test_an_error_in_the_middle_is_a_line(server: OllamaServed, client: Client) -> None:
    server.says("x" * 300)
    with pytest.raises(ResponseError, match="failed") as failed:
        parts = client.generate("tiny", "Hi", stream=True)
        assert next(parts).response == "x"
        server.model.error = RuntimeError("the memory burns")
        for part in parts:
            assert not part.done
    assert failed.value.status_code == -1  # the client's own: it stood in a line


def test_bodies_without_a_content_type(server: OllamaServed, client: Client) -> None:
    content = json.dumps({"model": "tiny", "prompt": "Hi", "stream": False}).encode()
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}):
        answer = httpx.post(server.url + "/api/generate", content=content, headers=headers)
        assert answer.status_code == 200 and answer.json()["response"] == "Hello"
