"""Requests that mean no good, or that come at a bad time: every one gets its 4xx, and nothing is left behind."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from served import MODEL, Served, serving, wait_for

HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as server:
        yield server


def chat(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": HELLO, "max_tokens": 4, **more}


def raw(served: Served, path: str, content: bytes) -> httpx.Response:
    return httpx.post(served.url + path, content=content, headers={"content-type": "application/json"}, timeout=30)


# ---- fields ----


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"modalities": ["audio"]}, "modalities"),
        ({"functions": []}, "functions"),
        ({"store": True}, "store"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"stream_options": {"other": 1}}, "stream_options.other"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"n": -1}, "n"),
        ({"n": "2"}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 300}, "stop"),
        ({"stop": [1]}, "stop.0"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [100000]}, "allowed_token_ids"),
        ({"stop_token_ids": [100000]}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, None),
        ({"response_format": {"type": "xml"}}, None),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "number?"}}}},
            None,
        ),
        ({"structured_outputs": {"regex": "("}}, None),
        ({"structured_outputs": {"grammar": "nonsense"}}, None),
        ({"structured_outputs": {"choice": []}}, None),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, None),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True, "chat_template": "x"}}, "chat_template_kwargs"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"cache_salt": "x" * 1000}, "cache_salt"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"messages": [{"role": "user", "content": "x", "more": 1}]}, "messages.0.more"),
        ({"seed": "x"}, "seed"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_a_field_that_cannot_be_used_is_named(served: Served, more: dict[str, Any], param: str | None) -> None:
    for stream in (False, True):
        answer = served.post("/v1/chat/completions", chat(**more, stream=stream))
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert param is None or error["param"] == param, error


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty", "min_p", "presence_penalty"])
def test_numbers_that_are_none(served: Served, field: str, value: str) -> None:
    body = json.dumps(chat(**{field: "@"})).replace('"@"', value).encode()
    answer = raw(served, "/v1/chat/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in (field, None)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, -(2**70), 0])
def test_every_seed(served: Served, seed: int) -> None:
    assert served.post("/v1/chat/completions", chat(seed=seed)).status_code in (200, 400)


def test_values_that_leave_no_token(served: Served) -> None:
    """The client's fault, so not a 5xx: the grammar wants one token and the list allows another."""
    [x] = served.post("/tokenize", {"prompt": "X"}).json()["tokens"]
    more = {"allowed_token_ids": [x], "structured_outputs": {"choice": ["up"]}}
    answer = served.post("/v1/chat/completions", chat(**more))
    assert answer.status_code == 400, answer.text
    assert served.post("/v1/chat/completions", chat()).status_code == 200


# ---- bodies ----


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000,
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "\\ud800": 1}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "user": "\\udfff"}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stop": "\\udfff"}',
        b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": '
        + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}",
    ],
    ids=lambda content: content[:40].decode("latin-1") + str(len(content)),
)  # fmt: skip
def test_bodies_that_cannot_be_read(served: Served, content: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
        answer = raw(served, path, content)
        assert 400 <= answer.status_code < 500, (path, answer.text)
        assert answer.json()["error"]["message"]


def test_a_body_that_is_too_large() -> None:
    with serving(max_body_bytes=1000) as served:
        assert raw(served, "/tokenize", json.dumps({"prompt": "x" * 900}).encode()).status_code == 200
        answer = raw(served, "/tokenize", json.dumps({"prompt": "x" * 1100}).encode())
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["error"]["message"]

        def pieces() -> Iterator[bytes]:  # without a length
            yield b'{"prompt": "'
            for _ in range(20):
                yield b"x" * 100
            yield b'"}'

        answer = httpx.post(served.url + "/tokenize", content=pieces(), timeout=30)
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["error"]["message"]


def test_headers_that_are_too_large(served: Served) -> None:
    answer = httpx.get(served.url + "/health", headers={"x-large": "x" * 100_000})
    assert 400 <= answer.status_code < 500


def test_the_loop_goes_on_while_large_bodies_are_read(served: Served) -> None:
    """A probe is answered quickly, whatever is being parsed, encoded or rendered."""
    body = json.dumps({"model": MODEL, "input": [1, 2] * 600_000}).encode()
    words = json.dumps({"model": MODEL, "prompt": "word " * 800_000}).encode()
    slow: list[float] = []
    done = threading.Event()

    def probe() -> None:
        with httpx.Client(base_url=served.url) as client:
            while not done.is_set():
                begin = time.perf_counter()
                client.get("/health")
                slow.append(time.perf_counter() - begin)
                time.sleep(0.002)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        assert raw(served, "/v1/embeddings", body).status_code == 400
        assert raw(served, "/v1/completions", words).status_code == 400
    finally:
        done.set()
        prober.join()
    assert max(slow) < 0.5, max(slow)


# ---- access ----


def test_every_route_but_the_probes_wants_the_key() -> None:
    with serving(api_key="sécret") as served:
        routes = [(r.path, sorted(r.methods)[0]) for r in served.app.routes if hasattr(r, "methods")]
        assert len(routes) >= 11
        for path, method in routes:
            path = path.replace("{name:path}", MODEL)
            answer = httpx.request(method, served.url + path, json={} if method == "POST" else None)
            assert (answer.status_code == 401) == (path not in ("/health", "/ready", "/version")), path
            for key in ("wrong", "x", "sécre", "sécrets", "secret"):
                headers = {"Authorization": f"Bearer {key}".encode()}
                assert httpx.request(method, served.url + path, headers=headers).status_code in (401, 200)
                if path not in ("/health", "/ready", "/version"):
                    assert httpx.request(method, served.url + path, headers=headers).status_code == 401
        right = {"Authorization": "Bearer sécret".encode()}
        assert httpx.get(served.url + "/v1/models", headers=right).status_code == 200


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models", "/./v1/models", "/health/../v1/models", "/v1/models/", "/V1/models", "/%76%31/models",
        "/health/../v1/models?x=/health", "/v1/models#/health", "http://x/health/../v1/models", "/v1/models;/health",
        "/health%2f..%2fv1%2fmodels",
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_goes_around_the_key(target: str) -> None:
    with serving(api_key="secret") as served:
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        assert answer.split(b" ")[1] in (b"401", b"404", b"400"), answer
        assert b'"data"' not in answer


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.0.1:80", ""]
)
def test_other_names_are_refused_on_loopback(served: Served, host: str) -> None:
    for path in ("/health", "/v1/models"):
        assert served.get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:80"])
def test_names_of_this_machine_are_welcome(served: Served, host: str) -> None:
    assert served.get("/v1/models", headers={"Host": host}).status_code == 200


def test_web_pages_are_let_in_by_name_only() -> None:
    with serving(allowed_origins=("http://good.example",)) as served:
        for origin, allowed in (("http://good.example", "http://good.example"), ("http://bad.example", None)):
            answer = served.get("/v1/models", headers={"Origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed
            assert "access-control-allow-credentials" not in answer.headers


# ---- too much at once ----


def test_a_full_queue_says_when_to_come_back() -> None:
    with serving(max_queue=2) as served:
        served.model.gate.clear()
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(served.post("/v1/chat/completions", chat())))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: served.app.state.server.admission.num_requests == 2)
        for stream in (False, True):
            refused = served.post("/v1/chat/completions", chat(stream=stream))
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert 1 <= int(refused.headers["retry-after"]) <= 3600
        assert served.get("/health").status_code == 200
        assert "nybble_requests_refused_total 2.0" in served.get("/metrics").text
        served.model.gate.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert served.post("/v1/chat/completions", chat()).status_code == 200


def test_the_queue_is_bounded_in_tokens() -> None:
    with serving(max_queue_tokens=600) as served:
        served.model.gate.clear()
        answers: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: answers.append(served.post("/v1/chat/completions", chat(max_tokens=400)))
        )
        thread.start()
        wait_for(lambda: served.app.state.server.admission.num_requests == 1)
        assert served.post("/v1/chat/completions", chat(max_tokens=400)).status_code == 429
        assert served.post("/v1/embeddings", {"model": MODEL, "input": ["x" * 500]}).status_code == 429
        served.model.gate.set()
        thread.join()
        assert answers[0].status_code == 200


# ---- clients that leave, models that fail ----


def leave(served: Served, body: dict[str, Any], *, read: int = 0) -> None:
    """Send a request, read so many bytes of the answer, and hang up."""
    host, port = served.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(head.encode() + content)
    while read > 0 and (piece := connection.recv(read)):
        read -= len(piece)
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_answer_is_written(stream: bool) -> None:
    with serving() as served:
        served.model.delay = 0.01
        leave(served, chat(max_tokens=400, stream=stream), read=300 if stream else 0)
        wait_for(lambda: served.engine.stats().prompt_tokens > 0)
        served.wait_until_idle()
        assert served.engine.stats().generation_tokens < 100


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits(stream: bool) -> None:
    with serving(engine_options={"max_num_seqs": 1}) as served:
        served.model.gate.clear()
        for _ in range(5):
            leave(served, chat(max_tokens=400, stream=stream))
        time.sleep(0.5)
        served.model.gate.set()
        served.wait_until_idle()


def test_clients_that_leave_at_every_moment(served: Served) -> None:
    served.model.delay = 0.001
    try:
        for number in range(60):
            leave(served, chat(max_tokens=100, stream=True, n=1 + number % 3), read=(number % 20) * 40)
    finally:
        served.model.delay = 0.0
    served.wait_until_idle()


def test_a_step_that_fails_ends_its_requests_only() -> None:
    with serving() as served:
        served.model.error = RuntimeError("the model broke")
        answer = served.post("/v1/chat/completions", chat())
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert served.post("/v1/chat/completions", chat()).status_code == 200
        # In a stream that has begun, an error is an event that OpenAI's client raises.
        served.model.delay = 0.02
        body = json.dumps(chat(max_tokens=100, stream=True))
        headers = {"content-type": "application/json"}
        url = served.url + "/v1/chat/completions"
        with httpx.stream("POST", url, content=body, headers=headers, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            served.model.error = RuntimeError("the model broke")
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["error"]["type"] == "server_error"


def test_infinite_waits_are_never_promised() -> None:
    from nybble.serve.admission import Admission
    from nybble.serve.settings import ServeSettings

    admission = Admission(ServeSettings(MODEL))
    assert math.isfinite(admission.seconds_left())
