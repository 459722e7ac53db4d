"""Models, embeddings, tokens, probes, figures."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
from served import CONTEXT, MODEL, Served, serving

from nybble import __version__


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("Yes.") as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="nothing"):
        client.models.retrieve("nothing")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_another_model_is_a_404(served: Served, path: str) -> None:
    body = {"model": "gpt-9", "messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x"}
    wanted = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/embeddings": "input"}[path]
    answer = served.post(path, {"model": "gpt-9", wanted: body[wanted]})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert MODEL in answer.json()["error"]["message"]


def test_embeddings(client: openai.OpenAI, served: Served) -> None:
    """The client asks for base64 unless it is told otherwise; both are the same numbers."""
    packed = client.embeddings.create(model=MODEL, input=["one", "two"])
    plain = client.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="float")
    assert [entry.index for entry in packed.data] == [0, 1]
    assert packed.usage.prompt_tokens == packed.usage.total_tokens == 5
    for one, other in zip(packed.data, plain.data, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, rtol=1e-6)
        assert np.linalg.norm(one.embedding) == pytest.approx(1, abs=1e-6)
    raw = served.post("/v1/embeddings", {"model": MODEL, "input": "one", "encoding_format": "base64"}).json()
    vector = np.frombuffer(base64.b64decode(raw["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, packed.data[0].embedding, rtol=1e-6)


def test_embeddings_of_token_ids(client: openai.OpenAI, served: Served) -> None:
    ids = served.post("/tokenize", {"prompt": "one"}).json()["tokens"]
    vectors = [client.embeddings.create(model=MODEL, input=form).data[0].embedding for form in ("one", ids, [ids])]
    assert vectors[0] == vectors[1] == vectors[2]


def test_embeddings_by_the_last_token(client: openai.OpenAI) -> None:
    mean, last = (
        client.embeddings.create(model=MODEL, input="one", extra_body={"pooling": pooling}).data[0].embedding
        for pooling in ("mean", "last")
    )
    assert mean != last


def test_embeddings_with_the_asynchronous_client(served: Served) -> None:
    async def ask() -> int:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as client:
            return len((await client.embeddings.create(model=MODEL, input="one")).data)

    assert asyncio.run(ask()) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"input": []},
        {"input": ""},
        {"input": ["one", ""]},
        {"input": [9999999]},
        {"input": ["x" * 2000, "y"]},
        {"input": {}},
    ],
)
def test_embeddings_of_nothing(served: Served, body: dict[str, Any]) -> None:
    answer = served.post("/v1/embeddings", {"model": MODEL, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_dimensions_are_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="dimensions") as caught:
        client.embeddings.create(model=MODEL, input="one", dimensions=2)
    assert caught.value.param == "dimensions"


def test_tokens_there_and_back(served: Served) -> None:
    text = "the lower <|eos|> größe 語"
    answer = served.post("/tokenize", {"prompt": text}).json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == CONTEXT
    assert served.post("/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": [1.5]}),
        ("/detokenize", {"tokens": [True]}),
    ],
)
def test_tokens_that_do_not_exist(served: Served, path: str, body: dict[str, Any]) -> None:
    assert served.post(path, body).status_code == 400


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_tokens_of_another_model(served: Served, path: str) -> None:
    body = {"/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [1]}}[path]
    assert served.post(path, {**body, "model": "gpt-9"}).status_code == 404
    assert served.post(path, {**body, "model": MODEL}).status_code == 200


def test_probes(served: Served) -> None:
    assert served.get("/health").status_code == 200
    assert served.get("/ready").status_code == 200
    assert served.get("/version").json() == {"version": __version__}


def test_metrics(served: Served, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="x", max_tokens=5)
    answer = served.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    values = {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in answer.text.splitlines()
        if not line.startswith("#")
    }
    assert values["nybble_generation_tokens_total"] >= 4
    assert values["nybble_prompt_tokens_total"] >= 1
    assert values["nybble_num_requests_running"] == 0
    assert values["nybble_num_requests_waiting"] == 0
    assert values["nybble_kv_cache_usage_ratio"] == 0
    assert values["nybble_kv_cache_waste_ratio"] == 0
    assert 0 <= values["nybble_prefix_cache_hit_ratio"] <= 1
    assert values["nybble_preemptions_total"] == 0
    assert values["nybble_model_seconds_total"] > 0
    for name in ("time_to_first_token", "time_per_output_token", "request", "queue"):
        assert values[f"nybble_{name}_seconds_count"] >= 1
    assert values['nybble_requests_finished_total{reason="stop"}'] >= 1


def test_what_is_not_here(served: Served) -> None:
    answer = served.get("/v2/anything")
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"
    answer = served.get("/v1/chat/completions")
    assert answer.status_code == 405
    assert "error" in answer.json()
