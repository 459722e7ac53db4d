"""Who may ask, how much, and what happens when there is too much or the server stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from tiny_server import Running, running

from nybble.serve.admission import Admission
from nybble.serve.errors import ApiError
from nybble.serve.settings import ServeSettings

pytestmark = pytest.mark.e2e


def ask(url: str, *, body: object | None = None, raw: bytes | None = None, **headers: str):
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_key_guards_all_but_the_health(folder: Path) -> None:
    with running(folder, api_key="secret") as started:
        assert ask(f"{started.url}/health")[0] == 200
        for path in ("/v1/models", "/metrics", "/no/such/path"):
            assert ask(started.url + path)[0] == 401
            assert ask(started.url + path, Authorization="Bearer wrong")[0] == 401
            assert ask(started.url + path, Authorization="Basic secret")[0] == 401
        assert ask(f"{started.url}/v1/models", Authorization="Bearer secret")[0] == 200


def test_other_host_names_are_refused(server: Running) -> None:
    assert ask(f"{server.url}/v1/models", Host="evil.example")[0] == 403
    assert ask(f"{server.url}/v1/models", Host="localhost:1234")[0] == 200


def test_errors_have_one_shape(server: Running) -> None:
    for status, path, raw in [
        (404, "/nope", None),
        (405, "/v1/models", b"{}"),
        (400, "/v1/completions", b"{not json"),
        (400, "/v1/completions", b"[]"),
        (400, "/v1/completions", b'{"model": "tiny"}'),
        (400, "/v1/chat/completions", b'{"model": "tiny", "messages": []}'),
        (400, "/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "user"}]}'),
        (400, "/v1/chat/completions", b'{"model": "tiny", "messages": [{"role": "root", "content": "x"}]}'),
        (400, "/detokenize", b'{"tokens": [123456789]}'),
        (400, "/v1/completions", b'{"model": "tiny", "prompt": "\\ud800"}'),
        (413, "/v1/completions", b" " * (9 * 2**20)),
    ]:
        try:
            got, body = ask(server.url + path, raw=raw)
        except (urllib.error.URLError, ConnectionError):
            assert status == 413  # refused before it was read
            continue
        assert got == status, (path, raw, body)
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_no_cors_unless_asked_for(server: Running) -> None:
    request = urllib.request.Request(f"{server.url}/v1/models", headers={"Origin": "http://a.example"})
    with urllib.request.urlopen(request) as answer:
        assert "access-control-allow-origin" not in answer.headers


def test_metrics_count(server: Running) -> None:
    ask(f"{server.url}/v1/completions", body={"model": "tiny", "prompt": [1, 2], "max_tokens": 3})
    text = ask(f"{server.url}/metrics")[1].decode()
    for name in ("generation_tokens_total", "time_to_first_token_seconds_count", "kv_cache_waste_ratio"):
        assert f"nybble_{name}" in text


def test_a_full_queue_says_when_to_come_back() -> None:
    admission = Admission(ServeSettings(model_name="x", max_queue=2, max_queue_tokens=100))
    with admission.admit(50), admission.admit(50):
        with pytest.raises(ApiError) as refused, admission.admit(1):
            pass
        assert refused.value.status == 429
        assert int((refused.value.headers or {})["Retry-After"]) >= 1
    with admission.admit(500):  # alone, a large one is let in
        pass
    admission.is_open = False
    with pytest.raises(ApiError) as closed, admission.admit(1):
        pass
    assert closed.value.status == 503


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from nybble.cli.app import main; main()", "serve", str(folder)]
    options = ["--port", "0", "--ctx", "192", "--kv-cache-memory", "16MiB", "--max-num-seqs", "8", *more]
    return subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env={**os.environ})


def address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if " is served at " in line:
            return line.split(" is served at ")[1].strip()
    raise AssertionError("the server did not start")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_an_answer_finish(folder: Path, number: signal.Signals) -> None:
    with start(folder) as process:
        body = {"model": folder.name, "prompt": [1], "max_tokens": 150, "ignore_eos": True, "stream": True}
        request = urllib.request.Request(
            f"{address(process)}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            first = answer.readline()
            process.send_signal(number)
            rest = answer.read()
        assert first.startswith(b"data: ")
        assert rest.endswith(b"data: [DONE]\n\n")
        assert b'"finish_reason":"length"' in rest
        assert process.wait(20) == 0


def test_a_port_that_is_taken(folder: Path, server: Running) -> None:
    process = start(folder, "--port", server.url.rsplit(":", 1)[1])
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "cannot listen on 127.0.0.1" in errors
