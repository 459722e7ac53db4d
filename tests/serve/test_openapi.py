"""Requests made up from our own OpenAPI document, valid and not: the server never fails, and nothing stays behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.openapi import from_dict
from served import MODEL, VOCAB, Served, serving

_EXAMPLES = 30  # of each route, and of each kind
_LONGEST = 24  # tokens of an answer: more would only take time
_ROUTES = [
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/embeddings",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models/{name}",
]
_WITHOUT_INPUT = {f"GET {path}" for path in ("/v1/models", "/health", "/ready", "/version", "/metrics")}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def operations(served: Served) -> dict[str, Any]:
    """What the document describes, by method and path."""
    schema = from_dict(served.get("/openapi.json").json())
    schema.config.update(base_url=served.url)
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


def test_the_document_describes_every_route(operations: dict[str, Any]) -> None:
    assert set(operations) == set(_ROUTES) | _WITHOUT_INPUT


@pytest.mark.parametrize(
    ("route", "mode"),
    [(route, mode) for route in _ROUTES for mode in GenerationMode if mode.is_positive or route.startswith("POST")],
)
def test_no_request_makes_the_server_fail(
    operations: dict[str, Any], served: Served, route: str, mode: GenerationMode
) -> None:
    seen: Counter[int] = Counter()

    @settings(
        max_examples=_EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operations[route].as_strategy(generation_mode=mode))
    def ask(case: Case) -> None:
        _make_it_matter(case.body)
        answer = case.call()
        seen[answer.status_code] += 1
        assert answer.status_code < 500, f"{answer.status_code} {answer.text} for {case.as_curl_command()}"
        if answer.status_code >= 400:
            _check_error(answer.json())

    ask()
    if route.startswith("POST"):
        wanted = range(200, 300) if mode.is_positive else range(400, 500)
        assert any(status in wanted for status in seen), f"only {dict(seen)}: it tests nothing"


def _check_error(body: dict[str, Any]) -> None:
    """OpenAI's shape, or TGI's on the routes that both have."""
    error = body["error"]
    if isinstance(error, str):
        assert error and body["error_type"]
    else:
        assert error["message"] and error["type"]


def _make_it_matter(body: Any) -> None:
    """Mend what the document cannot say about a good request; else hardly one would reach the engine."""
    if not isinstance(body, dict) or not isinstance(body.get("model"), str) or len(body["model"]) % 8 == 7:
        return  # some stay as they are
    body["model"] = MODEL
    if "prompt" in body and "messages" in body:
        del body["prompt"]
    for message in body.get("messages") or []:
        if isinstance(message, dict) and not message.get("content"):
            message["content"] = "Hello"
    for name in ("prompt", "input", "tokens", "allowed_token_ids", "stop_token_ids"):
        if name in body:
            body[name] = _small_ids(body[name]) or "A text"
    if "stream" in body or "n" in body or "max_tokens" in body:
        body["max_tokens"] = _LONGEST
        body.pop("max_completion_tokens", None)
    if body.get("top_logprobs") is not None:
        body["logprobs"] = True
    if not body.get("tools"):
        body.pop("tool_choice", None)


def _small_ids(value: Any) -> Any:
    """To JSON Schema 1.0 is an integer, to us it is not."""
    if isinstance(value, list):
        return [_small_ids(item) for item in value]
    return int(value) % VOCAB if isinstance(value, float | int) and not isinstance(value, bool) else value
