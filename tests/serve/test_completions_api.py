"""/v1/completions with OpenAI's own client, and what lm-eval's local-completions asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served import MODEL, Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def ids_of(served: Served, text: str) -> list[int]:
    ids: list[int] = served.post("/tokenize", {"prompt": text}).json()["tokens"]
    return ids


def test_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=7)
    assert answer.object == "text_completion"
    assert len(answer.choices) == 1
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 7)


def test_sixteen_tokens_unless_told_otherwise(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_every_form_of_prompt_gives_the_same(client: openai.OpenAI, served: Served) -> None:
    ids = ids_of(served, "Once")
    forms: list[Any] = ["Once", ["Once"], ids, [ids]]
    texts = [client.completions.create(model=MODEL, prompt=form, max_tokens=7).choices[0].text for form in forms]
    assert len(set(texts)) == 1


def test_several_prompts_and_samples(client: openai.OpenAI) -> None:
    alone = [client.completions.create(model=MODEL, prompt=p, max_tokens=5).choices[0].text for p in ("one", "two")]
    answer = client.completions.create(model=MODEL, prompt=["one", "two"], max_tokens=5, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]
    texts = [""] * 4
    ended = [0] * 4
    stream = client.completions.create(
        model=MODEL, prompt=["one", "two"], max_tokens=5, n=2, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ended[choice.index] += choice.finish_reason is not None
    assert texts == [choice.text for choice in answer.choices]
    assert ended == [1] * 4
    assert chunk.choices == []
    assert chunk.usage == answer.usage


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=4, logprobs=2)
    logprobs: Any = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 4
    assert all(
        top[token] == value
        for top, token, value in zip(logprobs.top_logprobs, logprobs.tokens, logprobs.token_logprobs, strict=True)
    )
    assert logprobs.text_offset == [0, 1, 2, 3]
    streamed = []
    for chunk in client.completions.create(model=MODEL, prompt="Once", max_tokens=4, logprobs=2, stream=True):
        found: Any = chunk.choices[0].logprobs
        streamed += list(zip(found.tokens, found.token_logprobs, found.text_offset, strict=True))
    assert streamed == list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.text_offset, strict=True))


def test_echo(client: openai.OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt="Once", max_tokens=4).choices[0].text
    assert (
        client.completions.create(model=MODEL, prompt="Once", max_tokens=4, echo=True).choices[0].text == "Once" + plain
    )


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_the_loglikelihood_of_a_prompt(client: openai.OpenAI, served: Served, max_tokens: int) -> None:
    """What lm-eval sends: token ids, echo, one log-probability. It reads tokens, token_logprobs and top_logprobs."""
    prompts = [ids_of(served, "the answer"), ids_of(served, "another one")]
    answer = client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True, temperature=0, seed=1234
    )
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        logprobs: Any = choice.logprobs
        assert len(logprobs.tokens) == len(prompt) + max_tokens
        assert logprobs.token_logprobs[0] is None
        assert logprobs.top_logprobs[0] is None
        assert all(value < 0 for value in logprobs.token_logprobs[1 : len(prompt)])
        assert all(top for top in logprobs.top_logprobs[1:])
        assert "".join(logprobs.tokens) == choice.text
        offsets = [sum(map(len, logprobs.tokens[:i])) for i in range(len(logprobs.tokens))]
        assert logprobs.text_offset == offsets
    assert answer.usage is not None
    assert answer.usage.completion_tokens == max_tokens * 2


def test_the_likeliest_of_tokens_with_one_text_is_told(client: openai.OpenAI, served: Served) -> None:
    """Single bytes of longer characters all look the same; the greatest log-probability of them counts."""
    answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=1, logprobs=20)
    logprobs: Any = answer.choices[0].logprobs
    top = logprobs.top_logprobs[0]
    assert max(top.values()) == logprobs.token_logprobs[0]


def test_a_schema_for_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="x", max_tokens=50, extra_body={"structured_outputs": {"choice": ["left", "right"]}}
    )
    assert answer.choices[0].text in ("left", "right")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, None),
        ({"prompt": ""}, None),
        ({"prompt": [1, 100000]}, None),
        ({"prompt": [1, -1]}, None),
        ({"prompt": [1, "two"]}, None),
        ({"prompt": ["fine", "x" * 2000]}, None),
        ({"prompt": [[1, 2], [99999]]}, None),
        ({"prompt": None}, "prompt"),
        ({"logprobs": 1000}, "logprobs"),
        ({"echo": True, "stream": True}, "echo"),
    ],
)
def test_what_cannot_be_served_is_a_400(served: Served, more: dict[str, Any], param: str | None) -> None:
    answer = served.post("/v1/completions", {"model": MODEL, "prompt": "Once", "max_tokens": 4, **more})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert error["message"]


def test_a_prompt_that_is_too_long_has_its_own_code(served: Served) -> None:
    for body in ({"prompt": "x" * 2000}, {"prompt": "x" * 2000, "stream": True}, {"prompt": ["x" * 2000] * 3}):
        answer = served.post("/v1/completions", {"model": MODEL, **body})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
