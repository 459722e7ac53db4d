"""Making, describing, fetching and removing models through Ollama's API, mostly by Ollama's own client."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import constants, hf_api
from ollama import Client, ResponseError
from ollama_served import OllamaServed, ollama
from served import wait_for

from tiny_files import gguf_model

sys.path.append(str(Path(__file__).parents[1] / "store"))
from fake_hub import FakeHub, running

TEMPLATE = "{{- range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}{{ if .Tools }}{{ .Tools }}{{ end }}<assistant>"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaServed]:
    def quantizer(to: str) -> Any:
        if to != "q4_K_M":
            raise ValueError
        return lambda source, target: target.write_bytes(gguf_model(extra={"general.file_type": 15}))

    with ollama(tmp_path_factory.mktemp("store"), quantizer=quantizer) as made:
        yield made


@pytest.fixture(scope="module")
def one_client(server: OllamaServed) -> Iterator[Client]:
    with Client(server.url) as made:
        yield made


@pytest.fixture
def client(server: OllamaServed, one_client: Client) -> Iterator[Client]:
    yield one_client
    for model in server.library.list():
        if str(model.name) != "tiny:latest":
            server.library.remove(str(model.name))


# ---- what there is ----


def test_root_and_version(server: OllamaServed) -> None:
    assert server.get("/").text == "Ollama is running"
    version = server.get("/api/version").json()["version"]
    assert [part.isdecimal() for part in version.split(".")] == [True] * 3
    for path in ("/", "/api/version", "/api/tags"):
        answer = httpx.head(server.url + path)
        assert answer.status_code == 200 and not answer.content


def test_list(server: OllamaServed, client: Client) -> None:
    (model,) = client.list().models
    assert model.model == "tiny:latest" and model.size == server.file.stat().st_size
    assert model.modified_at is not None and model.modified_at.tzinfo is not None
    assert model.digest is not None and len(model.digest) == 64
    details = model.details
    assert details is not None
    assert (details.format, details.family, details.families) == ("gguf", "llama", ["llama"])
    assert details.quantization_level == "F16" and details.parameter_size is not None


def test_a_damaged_file_is_listed_all_the_same(server: OllamaServed, client: Client, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and no more")
    server.library.create("bad", f"FROM {tmp_path / 'bad.gguf'}", base_folder=tmp_path, progress=lambda status: None)
    assert {model.model for model in client.list().models} == {"bad:latest", "tiny:latest"}
    with pytest.raises(ResponseError) as refused:
        client.show("bad")
    assert refused.value.status_code == 400


def test_show(server: OllamaServed, client: Client) -> None:
    client.create(
        "shown",
        from_="tiny",
        template=TEMPLATE,
        system="Be brief.",
        license=["MIT", "and more"],
        parameters={"temperature": 0.5, "stop": ["<user>", '"'], "num_ctx": 100},
        messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    )
    shown = client.show("shown")
    assert shown.template == TEMPLATE and shown.license == "MIT\nand more"
    assert shown.capabilities == ["completion", "tools"]
    assert shown.details is not None and shown.details.parent_model == "tiny:latest"
    assert shown.modelinfo is not None
    assert shown.modelinfo["general.architecture"] == "llama" and shown.modelinfo["llama.context_length"] > 0
    assert shown.modelinfo["tokenizer.ggml.scores"] is None
    assert shown.parameters is not None
    assert [line.split() for line in shown.parameters.splitlines()] == [
        ["temperature", "0.5"],
        ["stop", '"<user>"'],
        ["stop", '"\\""'],
        ["num_ctx", "100"],
    ]
    more = server.post("/api/show", {"model": "shown", "verbose": True}).json()
    assert more["system"] == "Be brief." and [one["role"] for one in more["messages"]] == ["user", "assistant"]
    assert more["model_info"]["tokenizer.ggml.scores"] == list(range(2000))
    assert more["tensors"][0].keys() == {"name", "type", "shape"}
    # The Modelfile makes the same model.
    server.library.create("again", more["modelfile"], base_folder=Path("/"), progress=lambda status: None)
    first, again = server.library.get("shown"), server.library.get("again")
    assert (again.system, again.parameters, again.messages) == (first.system, first.parameters, first.messages)


def test_ps(server: OllamaServed, client: Client) -> None:
    assert client.ps().models == []
    client.generate("tiny", keep_alive="10m")
    (one,) = client.ps().models
    assert (one.model, one.size, one.size_vram, one.context_length) == ("tiny:latest", 1000, 0, 512)
    assert one.expires_at is not None and 590 < one.expires_at.timestamp() - time.time() < 610
    client.generate("tiny", keep_alive=-1)
    (one,) = client.ps().models
    assert one.expires_at is not None and one.expires_at.year > 2200
    client.generate("tiny", keep_alive=0)
    assert client.ps().models == []


# ---- create ----


def test_what_is_made_is_used(server: OllamaServed, client: Client) -> None:
    server.says("Hello")
    lines = list(client.create("mine", from_="tiny", template=TEMPLATE, system="Be brief.", stream=True))
    assert lines[-1].status == "success" and len(lines) > 1
    client.create("yours", from_="mine", parameters={"num_predict": 2})
    answer = client.chat("yours", [{"role": "user", "content": "Hi"}])
    assert server.prompt() == "<system>Be brief.<user>Hi<assistant>"
    assert answer.done_reason == "length" and answer.eval_count == 2
    client.generate("yours", "Hi", system="Other.")
    assert server.prompt() == "<system>Other.<user>Hi<assistant>"
    client.generate("yours", keep_alive=0)


def test_create_from_a_blob(server: OllamaServed, client: Client, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf_model(extra={"general.name": "sent"}))
    digest = client.create_blob(file)
    assert digest == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert httpx.head(f"{server.url}/api/blobs/{digest}").status_code == 200
    assert client.create_blob(file) == digest
    assert client.create("sent", files={"model.gguf": digest}).status == "success"
    assert (client.show("sent").modelinfo or {})["general.name"] == "sent"


def test_quantize(client: Client) -> None:
    assert client.create("small", from_="tiny", quantize="q4_K_M").status == "success"
    details = client.show("small").details
    assert details is not None and details.quantization_level == "Q4_K_M"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "give either from"),
        ({"from": "tiny", "files": {"a": "sha256:" + "0" * 64}}, "give either from"),
        ({"files": {"a": "sha256:" + "0" * 64}}, "is not here"),
        ({"files": {"a": "../../etc/passwd"}}, "is not a digest"),
        ({"files": {"a": "sha256:" + "0" * 64, "b": "sha256:" + "0" * 64}}, "one GGUF file"),
        ({"from": "/etc/passwd"}, "/etc/passwd"),
        ({"from": "../weights.gguf"}, "weights.gguf"),
        ({"from": "nobody"}, "nobody"),
        ({"from": "tiny", "adapters": {"a": "sha256:" + "0" * 64}}, "is not here"),
        ({"from": "tiny", "template": "{{ if }}"}, "line"),
        ({"from": "tiny", "template": ""}, "template is empty"),
        ({"from": "tiny", "parameters": {"colour": 1}}, "no parameter 'colour'"),
        ({"from": "tiny", "parameters": {"top_k": "many"}}, "top_k"),
        ({"from": "tiny", "parameters": {"top_k": {"a": 1}}}, "top_k"),
        ({"from": "tiny", "parameters": {"stop": ["a\nFROM b"]}}, None),
        ({"from": "tiny\nSYSTEM x"}, "tiny"),
        ({"from": "tiny", "messages": [{"role": "judge", "content": "x"}]}, "role"),
        ({"from": "tiny", "modelfile": "FROM /etc/passwd"}, "modelfile is not supported"),
        ({"from": "tiny", "model": "../up"}, "up"),
        ({"from": "tiny", "model": "a" * 300}, "300"),
        ({"from": "tiny", "model": None}, "model is required"),
        ({"from": "tiny", "system": 'a"""\nb'}, '"""'),
    ],
)
def test_what_cannot_be_made(server: OllamaServed, client: Client, body: dict[str, Any], said: str | None) -> None:
    answer = server.post("/api/create", {"model": "made", "stream": False, **body})
    if said is None:
        assert answer.status_code == 200
        assert server.library.get("made").parameters == {"stop": ["a\nFROM b"]}
        return
    assert answer.status_code in (400, 404), answer.text
    assert said in answer.json()["error"]
    assert [str(model.name) for model in server.library.list()] == ["tiny:latest"]


# ---- blobs ----


def test_a_wrong_blob_leaves_nothing(server: OllamaServed) -> None:
    digest = "sha256:" + "1" * 64
    answer = httpx.post(f"{server.url}/api/blobs/{digest}", content=b"something else")
    assert answer.status_code == 400 and "the bytes have the digest" in answer.json()["error"]
    assert httpx.head(f"{server.url}/api/blobs/{digest}").status_code == 404
    assert digest not in server.library.blobs.digests()


@pytest.mark.parametrize("digest", ["sha256:short", "..%2F..%2Fx", "md5:" + "1" * 32, "sha256:" + "G" * 64, "%00"])
def test_what_is_no_digest_is_refused(server: OllamaServed, digest: str) -> None:
    for method in ("HEAD", "POST"):
        answer = httpx.request(method, f"{server.url}/api/blobs/{digest}", content=b"x" if method == "POST" else None)
        assert answer.status_code in (400, 404)


def test_a_large_blob_is_streamed(server: OllamaServed) -> None:
    piece = os.urandom(1 << 20)
    digest = hashlib.sha256()
    for _ in range(9):  # larger than any other body may be
        digest.update(piece)
    name = f"sha256:{digest.hexdigest()}"
    answer = httpx.post(f"{server.url}/api/blobs/{name}", content=(piece for _ in range(9)), timeout=30)
    assert answer.status_code == 201
    server.library.collect(keep_seconds=0)


def test_who_leaves_while_sending(server: OllamaServed) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /api/blobs/sha256:{'2' * 64} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000000\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + b"x" * 1000)
        time.sleep(0.1)
    wait_for(lambda: 1000 not in sizes(server.library.root))
    assert server.get("/").status_code == 200


def sizes(folder: Path) -> set[int]:
    """Of the files in it, but for those that vanish meanwhile."""
    found = set()
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found.add(os.path.getsize(os.path.join(parent, name)))
    return found


def test_there_must_be_room(server: OllamaServed) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /api/blobs/sha256:{'3' * 64} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {10**18}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode())
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 413") and b"free" in answer


# ---- copy, delete, pull, push ----


def test_copy_and_delete(server: OllamaServed, client: Client) -> None:
    assert client.copy("tiny", "other/name:v1").status == "success"
    assert {model.model for model in client.list().models} == {"tiny:latest", "other/name:v1"}
    server.says("Hello")
    client.generate("other/name:v1", "Hi")
    assert client.delete("other/name:v1").status == "success"
    assert {model.model for model in client.list().models} == {"tiny:latest"}
    assert client.ps().models == []
    for ask in (
        lambda: client.delete("other/name:v1"),
        lambda: client.copy("nobody", "x"),
        lambda: client.show("nobody"),
        lambda: client.chat("nobody", [{"role": "user", "content": "Hi"}]),
        lambda: client.copy("tiny", "../x"),
        lambda: client.delete("/etc/passwd"),
    ):
        with pytest.raises(ResponseError) as refused:
            ask()
        assert refused.value.status_code == 404


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running(FakeHub()) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.constants, "ENDPOINT", made.url)
        yield made


def test_pull(server: OllamaServed, client: Client, hub: FakeHub) -> None:
    hub.repositories["org/repo"] = {"model.gguf": gguf_model(extra={"general.name": "fetched"})}
    lines = list(client.pull("hf.co/org/repo", stream=True))
    assert lines[-1].status == "success"
    assert any(line.total and line.completed is not None and line.digest for line in lines)
    assert client.pull("hf.co/org/repo").status == "success"
    assert any((model.model or "").startswith("hf.co/org/repo") for model in client.list().models)
    answer = server.post("/api/pull", {"name": "hf.co/org/repo", "stream": False, "insecure": True})
    assert answer.json() == {"status": "success"} and "insecure" in answer.headers["x-nybble-warning"]


def test_pull_what_is_not_there(client: Client, hub: FakeHub) -> None:
    for name in ("nobody", "hf.co/org/none", "../x", "hf.co/x"):
        with pytest.raises(ResponseError) as refused:
            client.pull(name)
        assert refused.value.status_code in (400, 404)


def test_who_leaves_stops_the_pull(server: OllamaServed, client: Client, hub: FakeHub) -> None:
    hub.stall = threading.Event()
    hub.repositories["org/large"] = {"model.gguf": gguf_model() + bytes(1 << 20)}
    body = {"model": "hf.co/org/large"}
    with httpx.stream("POST", server.url + "/api/pull", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        while not hub.halfway.is_set():
            assert "error" not in next(lines)
    hub.stall.set()
    time.sleep(0.2)
    assert [str(model.name) for model in server.library.list()] == ["tiny:latest"]
    hub.stall = None
    hub.halfway.clear()
    assert client.pull("hf.co/org/large").status == "success"


def test_push_is_refused(client: Client) -> None:
    with pytest.raises(ResponseError, match="push is not supported") as refused:
        client.push("tiny")
    assert refused.value.status_code == 400


# ---- errors ----


def test_errors_have_ollamas_shape(server: OllamaServed) -> None:
    for answer in (
        server.get("/api/nothing"),
        server.get("/api/chat"),
        server.post("/api/chat", []),
        server.post("/api/chat", {"model": "tiny", "messages": [{"role": "user"}] * 2, "options": 5}),
        httpx.post(server.url + "/api/chat", content=b"{"),
        httpx.post(server.url + "/api/chat", content=b'{"model": "\\ud800"}'),
        httpx.post(server.url + "/api/chat", content=b"[" * 100_000),
        httpx.post(server.url + "/api/generate", content=b"x" * (5 << 20)),
        httpx.post(server.url + "/api/generate"),
        server.post("/api/generate", {"prompt": "Hi"}),
        httpx.get(server.url + "/api/tags", headers={"host": "evil.example"}),
    ):
        assert 400 <= answer.status_code < 500, answer.text
        assert isinstance(answer.json()["error"], str), answer.text


def test_web_pages_of_others_may_not_ask(server: OllamaServed) -> None:
    body = json.dumps({"model": "tiny", "prompt": ""}).encode()
    for origin, status in (
        ("https://evil.example", 403),
        ("null", 403),
        ("http://localhost.evil.example", 403),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:8080", 200),
        ("app://obsidian.md", 200),
    ):
        headers = {"origin": origin, "content-type": "text/plain"}
        answer = httpx.post(server.url + "/api/generate", content=body, headers=headers)
        assert answer.status_code == status, origin


def test_a_full_queue_is_503(tmp_path: Path) -> None:
    with ollama(tmp_path, max_queue=1) as server:
        server.model.gate.clear()
        with httpx.Client(base_url=server.url) as http:
            first = threading.Thread(target=server.post, args=("/api/generate", {"model": "tiny", "prompt": "Hi"}))
            first.start()
            wait_for(lambda: server.models.admission.num_requests == 1)
            answer = http.post("/api/generate", json={"model": "tiny", "prompt": "Hi"})
            assert answer.status_code == 503 and isinstance(answer.json()["error"], str)
            assert int(answer.headers["retry-after"]) >= 1
            server.model.gate.set()
            first.join(20)


def test_keys_are_wanted(tmp_path: Path) -> None:
    with ollama(tmp_path, api_key="secret") as server:
        answer = server.get("/api/tags")
        assert answer.status_code == 401 and isinstance(answer.json()["error"], str)
        with Client(server.url, headers={"Authorization": "Bearer secret"}) as client:
            assert len(client.list().models) == 1
