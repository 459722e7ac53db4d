"""`nybble ps` and `nybble stop`, which ask a server that runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from ollama_served import OllamaServed, ollama
from served import serving

from nybble.cli import app
from nybble.cli.server_client import ServerClient
from nybble.core.errors import ConfigError
from nybble.serve.lifecycle import bind

Nybble = Callable[..., int]


@pytest.fixture
def nybble(monkeypatch: pytest.MonkeyPatch) -> Nybble:
    """Runs a command in this process; returns the exit code."""
    monkeypatch.delenv("NYBBLE_HOST", raising=False)
    monkeypatch.delenv("NYBBLE_API_KEY", raising=False)

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["nybble", *arguments])
        with pytest.raises(SystemExit) as left:
            app.main()
        return int(left.value.code or 0)

    return run


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaServed]:
    with ollama(tmp_path_factory.mktemp("served")) as made:
        yield made


def test_a_model_is_shown_and_stopped(
    served: OllamaServed, nybble: Nybble, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NYBBLE_HOST", served.url)
    assert nybble("ps") == 0
    assert capsys.readouterr().out.split() == ["NAME", "ID", "SIZE", "CONTEXT", "UNTIL"]
    assert nybble("stop", "tiny") == 2
    assert "'tiny' is not in the memory of the server at 127.0.0.1:" in capsys.readouterr().err
    for keep_alive, until in (("5m", "4 minutes from now"), (-1, "the server stops")):
        served.post("/api/generate", {"model": "tiny", "keep_alive": keep_alive})
        assert nybble("ps", "--host", served.url) == 0
        line = capsys.readouterr().out.splitlines()[1]
        assert line.startswith("tiny:latest  ") and line.endswith(f"  512      {until}"), line
    assert nybble("stop", "TINY") == 0
    assert capsys.readouterr().out == "stopped TINY\n"
    assert served.models.resident() == []


def test_the_only_model_stays(nybble: Nybble, capsys: pytest.CaptureFixture[str]) -> None:
    with serving("Hello") as server:
        assert nybble("ps", "--host", server.url) == 0
        assert "the server stops" in capsys.readouterr().out
        assert nybble("stop", "tiny", "--host", server.url) == 0
        assert capsys.readouterr() == ("", "[this server was started with one model, which stays: stop the server]\n")
        assert server.engine.is_healthy()


def test_a_key_is_sent(nybble: Nybble, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("Hello", api_key="secret") as server:
        assert nybble("ps", "--host", server.url) == 2
        assert "set NYBBLE_API_KEY" in capsys.readouterr().err
        monkeypatch.setenv("NYBBLE_API_KEY", "secret")
        assert nybble("ps", "--host", server.url) == 0


def test_no_server_is_one_sentence(nybble: Nybble, capsys: pytest.CaptureFixture[str]) -> None:
    free = bind("127.0.0.1", 0)
    port = free.getsockname()[1]
    free.close()
    for command in (["ps"], ["stop", "x"]):
        assert nybble(*command, "--host", f":{port}") == 2
        message = f"error: no server answers at 127.0.0.1:{port} (Connection refused): start one with `nybble serve`"
        assert capsys.readouterr().err.startswith(message)


def test_what_is_no_server_of_ours(nybble: Nybble, capsys: pytest.CaptureFixture[str]) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *args: object) -> None: ...

    other = HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=other.handle_request)
    thread.start()
    assert nybble("ps", "--host", f"127.0.0.1:{other.server_port}") == 2
    assert "is not nybble: it says b'<html>'" in capsys.readouterr().err
    thread.join()
    other.server_close()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "127.0.0.1:8000"), ("127.0.0.1", "127.0.0.1:8000"), (":99", "127.0.0.1:99"),
        ("x.example:1/", "x.example:1"), ("http://localhost:11434", "localhost:11434"), ("[::1]:80", "[::1]:80"),
    ],
)  # fmt: skip
def test_addresses(text: str, shown: str) -> None:
    assert str(ServerClient.at(text)) == shown


@pytest.mark.parametrize("text", ["https://x", "x:0", "x:99999", "a b", "x/y", "http://x:1/y", "::1:80", "x:port"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="is not where a server listens"):
        ServerClient.at(text)


def test_a_folder_is_no_model(nybble: Nybble, tmp_path: Path, served: OllamaServed) -> None:
    for name in ("../x", str(tmp_path), "x" * 1000, "", "\x00"):
        assert nybble("stop", name, "--host", served.url) == 2
