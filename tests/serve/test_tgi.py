"""TGI's API, as huggingface_hub's client and plain requests see it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import GenerationError, OverloadedError, ValidationError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import CONTEXT, EOS, MODEL, Served, serving, tokenizer, wait_for

from nybble.serve.tgi.errors import IncompleteError, told
from nybble.serve.tgi.plan import _draws
from nybble.serve.tgi.schemas import Parameters

SCRIPT = "Hello you"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(SCRIPT) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> InferenceClient:
    return InferenceClient(model=served.url, token="unused")


def generate(served: Served, inputs: str = "Say", path: str = "/generate", **parameters: Any) -> httpx.Response:
    return served.post(path, {"inputs": inputs, "parameters": parameters})


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.splitlines() if line]
    assert all(line.startswith("data:") for line in lines)
    return [json.loads(line.removeprefix("data:")) for line in lines]


# ---- huggingface_hub ----


def test_the_client_gets_a_text(client: InferenceClient) -> None:
    assert client.text_generation("Say") == SCRIPT
    assert client.text_generation("Say", return_full_text=True, do_sample=True, top_p=0.9) == "Say" + SCRIPT


def test_the_client_gets_a_stream(client: InferenceClient) -> None:
    assert "".join(client.text_generation("Say", stream=True)) == SCRIPT + "<|eos|>"  # TGI tells it as a token too


def test_the_client_gets_details(client: InferenceClient) -> None:
    answer = client.text_generation("Say", details=True, decoder_input_details=True, top_n_tokens=2)
    details = answer.details
    assert answer.generated_text == SCRIPT
    assert (details.finish_reason, details.seed) == ("eos_token", None)
    ids = [*tokenizer().encode(SCRIPT, add_special=False), EOS]
    assert [token.id for token in details.tokens] == ids
    assert [token.special for token in details.tokens] == [False] * (len(ids) - 1) + [True]
    assert "".join(token.text for token in details.tokens[:-1]) == SCRIPT
    assert details.generated_tokens == len(ids)
    assert all(token.logprob <= 0 for token in details.tokens)
    assert [token.text for token in details.prefill] == ["S", "a", "y"]
    assert details.prefill[0].logprob is None and details.prefill[1].logprob < 0
    assert [len(top) for top in details.top_tokens] == [2] * len(ids)
    assert details.top_tokens[0][0]["id"] == ids[0]  # the client leaves these as they come
    sampled = client.text_generation("Say", details=True, do_sample=True, seed=7)
    assert sampled.details.seed == 7


def test_the_client_gets_a_stream_of_details(client: InferenceClient) -> None:
    told = list(client.text_generation("Say", stream=True, details=True, top_n_tokens=1, return_full_text=True))
    assert [one.index for one in told] == list(range(1, len(told) + 1))
    assert all(one.generated_text is None and one.details is None for one in told[:-1])
    assert told[-1].generated_text == "Say" + SCRIPT
    ending = told[-1].details
    assert (ending.finish_reason, ending.generated_tokens, ending.input_length) == ("eos_token", len(told), 3)
    assert all(one.top_tokens[0].id == one.token.id for one in told)


def test_the_client_reads_our_errors(served: Served, client: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="typical_p is not supported"):
        client.text_generation("Say", typical_p=0.5)
    with pytest.raises(ValidationError, match="decoder_input_details does not go with a stream"):
        list(client.text_generation("Say", stream=True, details=True, decoder_input_details=True))
    served.model.error = RuntimeError("the step failed")
    with pytest.raises(GenerationError):
        client.text_generation("Say")
    assert client.text_generation("Say") == SCRIPT
    with serving(SCRIPT, max_queue=1) as full:
        full.model.gate.clear()
        thread = threading.Thread(target=lambda: generate(full))
        thread.start()
        wait_for(lambda: full.app.state.server.admission.num_requests == 1)
        with pytest.raises(OverloadedError, match="try again in"):
            InferenceClient(model=full.url, token="unused").text_generation("Say")
        refused = generate(full)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        full.model.gate.set()
        thread.join()


# ---- parameters ----


def test_texts_that_stop_an_answer_are_part_of_it(served: Served) -> None:
    answer = generate(served, stop=["lo"], details=True).json()
    assert (answer["generated_text"], answer["details"]["finish_reason"]) == ("Hello", "stop_sequence")
    answer = generate(served, max_new_tokens=2, details=True).json()
    assert (answer["details"]["finish_reason"], answer["details"]["generated_tokens"]) == ("length", 2)


def test_the_last_tokens_are_kept(served: Served) -> None:
    answer = generate(served, "abcdefgh", truncate=3, details=True, decoder_input_details=True).json()
    assert [token["text"] for token in answer["details"]["prefill"]] == ["f", "g", "h"]
    assert generate(served, "x" * 100_000, truncate=5).status_code == 200
    assert generate(served, "x" * 1000).status_code == 422


def test_the_best_of_several(served: Served) -> None:
    details = generate(served, best_of=3, do_sample=True, details=True).json()["details"]
    others = details["best_of_sequences"]
    assert [one["generated_text"] for one in others] == [SCRIPT] * 2
    assert len({details["seed"], *(one["seed"] for one in others)}) == 3


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "regex", "value": "[0-9]{4}"},
        {"type": "json", "value": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
        {"type": "json", "value": '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'},
        {"type": "json_schema", "value": {"name": "x", "schema": {"type": "object", "additionalProperties": False}}},
    ],
    ids=lambda grammar: grammar["type"],
)
def test_grammars_are_kept_to(served: Served, grammar: dict[str, Any]) -> None:
    answer = generate(served, grammar=grammar, max_new_tokens=40)
    assert answer.status_code == 200, answer.text
    text = answer.json()["generated_text"]
    assert len(text) == 4 and text.isdigit() if grammar["type"] == "regex" else text.startswith("{")


def test_what_makes_an_answer_random() -> None:
    for given_, draws in (
        ({}, False), ({"do_sample": True}, True), ({"temperature": 0.5}, True), ({"temperature": 1.0}, False),
        ({"top_k": 3}, True), ({"top_p": 0.5}, True), ({"top_p": 1.0}, False), ({"seed": 4}, False),
    ):  # fmt: skip
        assert _draws(Parameters(**given_)) is draws


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"typical_p": 0.5}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": CONTEXT}, "max_new_tokens"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 1000, "do_sample": True}, "best_of"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"truncate": 0}, "truncate"),
        ({"truncate": CONTEXT}, "truncate"),
        ({"top_n_tokens": 0}, "top_n_tokens"),
        ({"top_n_tokens": 21}, "top_n_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * 3}, "stop"),
        ({"stop": ["x" * 300]}, "stop"),
        ({"adapter_id": ""}, "adapter_id"),
        ({"adapter_id": "none-such"}, None),
        ({"grammar": {"type": "xml", "value": "x"}}, "grammar"),
        ({"grammar": {"type": "json", "value": "{"}}, "grammar"),
        ({"grammar": {"type": "json", "value": [1]}}, "grammar"),
        ({"grammar": {"type": "regex", "value": {}}}, "grammar"),
        ({"grammar": {"type": "regex", "value": "("}}, None),
        ({"grammar": {"type": "json_schema", "value": {"schema": {}, "strict": True}}}, "strict"),
        ({"logit_bias": {}}, "logit_bias"),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else None,
)
def test_a_parameter_that_cannot_be_used_is_named(served: Served, more: dict[str, Any], name: str | None) -> None:
    for path in ("/generate", "/", f"/models/{MODEL}"):
        answer = generate(served, path=path, **more)
        assert answer.status_code == 422, answer.text
        assert set(answer.json()) == {"error", "error_type"}
        assert answer.json()["error_type"] == "validation"
        assert name is None or name in answer.json()["error"]
    assert generate(served, path="/generate_stream", **more).status_code == 422


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"inputs": ""}),
        ("/generate", {}),
        ("/generate", {"inputs": "x", "options": {}}),
        ("/generate", {"inputs": "x", "stream": True}),
        ("/generate_stream", {"inputs": "x", "stream": False}),
        ("/models/other", {"inputs": "x"}),
        (f"/models/{MODEL}", {"inputs": "x", "parameters": {"adapter_id": "other"}}),
        ("/tokenize", {"inputs": "x", "prompt": "y"}),
        ("/tokenize", {"inputs": "x" * 100_000}),
        ("/chat_tokenize", {"messages": []}),
    ],
)
def test_bodies_that_cannot_be_used(served: Served, path: str, body: dict[str, Any]) -> None:
    answer = served.post(path, body)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error_type"] == "validation"


# ---- routes ----


def test_the_root_answers_in_both_ways(served: Served) -> None:
    assert served.post("/", {"inputs": "Say"}).json() == [{"generated_text": SCRIPT}]
    assert served.post("/generate", {"inputs": "Say"}).json() == {"generated_text": SCRIPT}
    for path in ("/", f"/models/{MODEL}", "/generate_stream"):
        told = events(served.post(path, {"inputs": "Say", "stream": True}))
        assert told[-1]["generated_text"] == SCRIPT and told[-1]["details"] is None
        assert "top_tokens" not in told[0]
    assert served.get("/").text == "Ollama is running"


def test_the_model_is_described(served: Served) -> None:
    info = served.get("/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["max_input_tokens"]) == (MODEL, CONTEXT, CONTEXT - 1)


def test_tokens_have_their_places(served: Served) -> None:
    told = served.post("/tokenize", {"inputs": "a the é"}).json()
    assert "".join(one["text"] for one in told) == "a the é"
    assert all(one["text"] == "a the é"[one["start"] : one["stop"]] for one in told)
    assert [one["id"] for one in told] == served.post("/tokenize", {"prompt": "a the é"}).json()["tokens"]
    chat = served.post("/chat_tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert chat["templated_text"] == "<|bos|>user\nHi<|eos|><|bos|>assistant\n"
    assert chat["tokenize_response"][-1]["stop"] == len(chat["templated_text"])


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(served: Served) -> None:
    served.model.delay = 0.02
    with httpx.stream("POST", served.url + "/generate_stream", json={"inputs": "Say"}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        served.model.error = RuntimeError("the step failed")
        last = json.loads(list(lines)[-1].removeprefix("data:"))
    served.model.delay = 0.0
    assert last["error_type"] == "generation"


def test_an_answer_that_is_cut_off_says_so() -> None:
    assert told(IncompleteError())[::2] == (500, "incomplete_generation")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    inputs=st.text(max_size=20) | _JSON,
    parameters=st.dictionaries(st.sampled_from(sorted(Parameters.model_fields)), _JSON, max_size=4) | _JSON,
)
def test_no_body_makes_the_server_fail(served: Served, inputs: Any, parameters: Any) -> None:
    content = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    for path in ("/", "/generate_stream"):
        answer = httpx.post(served.url + path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 422), answer.text
        if answer.status_code == 422:
            assert set(answer.json()) == {"error", "error_type"}
