"""Starting, stopping, and clients that leave: answers are finished where they can be, and every block comes back."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from served import MODEL, ScriptedModel, Served, make_engine, serving, wait_for

from nybble.core.errors import ConfigError
from nybble.serve.app import create_app
from nybble.serve.lifecycle import bind, serve
from nybble.serve.settings import ServeSettings

LONG = {"model": MODEL, "prompt": "Once", "max_tokens": 60, "ignore_eos": True}


def send(number: signal.Signals = signal.SIGTERM) -> None:
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, number)


def run(act: Callable[[Served], None], *, engine_options: dict[str, int] | None = None, **settings: Any) -> float:
    """Serve in this thread, which signals reach, until `act` has sent one. Returns the seconds from there."""
    model = ScriptedModel()
    engine = make_engine(model, **(engine_options or {}))
    chosen = replace(ServeSettings(MODEL), **settings)
    listening = bind("127.0.0.1", 0)
    app = create_app(engine, chosen)
    served = Served(f"http://127.0.0.1:{listening.getsockname()[1]}", model, engine, app)
    failed: list[BaseException] = []
    done: list[float] = []

    def acting() -> None:
        try:
            act(served)
        except BaseException as error:
            failed.append(error)
        finally:
            model.gate.set()
            done.append(time.monotonic())
            if failed:  # the server must not wait for ever
                send()
                send()

    thread = threading.Thread(target=acting)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    serve(app, [listening], chosen, thread.start)
    end = time.monotonic()
    thread.join()
    if failed:
        raise failed[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert not engine.is_healthy()
    assert app.state.server.admission.num_requests == 0
    return end - done[0]


@contextmanager
def streaming(served: Served, **more: Any) -> Iterator[Iterator[str]]:
    """The lines of a streamed completion."""
    with httpx.stream("POST", served.url + "/v1/completions", json={**LONG, "stream": True, **more}, timeout=30) as one:
        assert one.status_code == 200, one.read()
        yield (line for line in one.iter_lines() if line)


def count(lines: list[str]) -> int:
    """How many tokens were streamed. Raises the error that is among them."""
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    return sum("choices" in event for event in events)


# ---- stopping ----


def test_what_runs_and_what_waits_is_answered_before_the_end() -> None:
    def act(served: Served) -> None:
        served.model.delay = 0.01
        waiting: list[httpx.Response] = []
        with streaming(served) as lines:
            first = next(lines)
            other = threading.Thread(target=lambda: waiting.append(served.post("/v1/completions", LONG)))
            other.start()
            wait_for(lambda: served.app.state.server.admission.num_requests == 2)
            send()
            wait_for(lambda: served.get("/ready").status_code == 503)
            assert served.get("/health").status_code == 200
            refused = served.post("/v1/completions", LONG)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert "shutting down" in refused.json()["error"]["message"]
            rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        assert count([first, *rest]) >= 60
        other.join()
        assert waiting[0].json()["usage"]["completion_tokens"] == 60

    run(act, engine_options={"max_num_seqs": 1})


def test_nothing_to_answer_means_no_wait() -> None:
    def act(served: Served) -> None:
        assert served.post("/v1/completions", {**LONG, "max_tokens": 2}).status_code == 200
        send(signal.SIGINT)

    assert run(act, drain_timeout=60) < 10


def test_a_connection_that_is_kept_open_delays_nothing() -> None:
    client = httpx.Client()

    def act(served: Served) -> None:
        assert client.get(served.url + "/health").status_code == 200
        send()

    assert run(act, drain_timeout=60) < 10
    client.close()


def test_the_drain_timeout_ends_what_is_left() -> None:
    def act(served: Served) -> None:
        served.model.delay = 0.05
        with streaming(served, max_tokens=400) as lines:
            next(lines)
            send()
            rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert error["type"] == "server_error"
        assert "shut down" in error["message"]

    run(act, drain_timeout=0.3)


def test_a_second_signal_ends_everything() -> None:
    def act(served: Served) -> None:
        served.model.delay = 0.05
        statuses: list[int] = []
        whole = threading.Thread(
            target=lambda: statuses.append(served.post("/v1/completions", {**LONG, "max_tokens": 400}).status_code)
        )
        whole.start()
        with streaming(served, max_tokens=400) as lines:
            next(lines)
            send()
            wait_for(lambda: served.get("/ready").status_code == 503)
            send()
            rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert "error" in json.loads(rest[-2].removeprefix("data: "))
        whole.join()
        assert statuses == [503]

    assert run(act, drain_timeout=60) < 10


# ---- the address ----


def test_a_port_that_is_taken_is_said() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert port > 0
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}.*choose another"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["256.0.0.1", "192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_here_is_said(host: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {host}"):
        bind(host, 0)


# ---- clients that leave ----


def connect(served: Served, body: dict[str, Any]) -> socket.socket:
    """Send a request and read nothing."""
    host, port = served.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("samples", [1, 3])
def test_a_client_that_leaves_costs_at_most_the_step_that_runs(stream: bool, samples: int) -> None:
    with serving() as served:
        served.model.delay = 0.005
        connection = connect(served, {**LONG, "max_tokens": 400, "stream": stream, "n": samples})
        wait_for(lambda: served.engine.stats().generation_tokens >= 5 * samples)
        served.model.gate.clear()  # the next step stands still
        time.sleep(0.05)
        assert served.engine.stats().kv_usage > 0
        steps = len(served.model.steps)
        connection.close()
        wait_for(lambda: not served.engine._streams)  # the server has heard of it
        served.model.gate.set()
        wait_for(lambda: served.engine.stats().kv_usage == 0)
        served.wait_until_idle()
        assert len(served.model.steps) <= steps + 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_answer_begins_never_runs(stream: bool) -> None:
    with serving(engine_options={"max_num_seqs": 1}) as served:
        served.model.gate.clear()
        answers: list[httpx.Response] = []
        first = threading.Thread(
            target=lambda: answers.append(served.post("/v1/completions", {**LONG, "max_tokens": 4}))
        )
        first.start()
        wait_for(lambda: served.engine.stats().num_running == 1)
        second = connect(served, {**LONG, "prompt": "Nobody reads this", "stream": stream})
        wait_for(lambda: len(served.engine._streams) == 2)
        second.close()
        wait_for(lambda: len(served.engine._streams) == 1)
        wait_for(lambda: served.app.state.server.admission.num_requests == 1)  # its place in the queue is free again
        served.model.gate.set()
        first.join()
        used = answers[0].json()["usage"]
        assert used["completion_tokens"] == 4
        served.wait_until_idle()
        assert served.engine.stats().prompt_tokens == used["prompt_tokens"]


def test_half_a_body_is_never_run() -> None:
    with serving() as served:
        connection = connect(served, LONG)
        connection.close()
        host, port = served.url.removeprefix("http://").split(":")
        half = socket.create_connection((host, int(port)), timeout=10)
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{")
        half.close()
        served.wait_until_idle()
        assert served.post("/v1/completions", {**LONG, "max_tokens": 2}).status_code == 200
