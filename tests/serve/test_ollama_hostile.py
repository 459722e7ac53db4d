"""Names and digests that mean no good, on every route of Ollama's API: one sentence, and nothing outside is touched."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ollama_served import OllamaServed, ollama

BAD = [
    "..", "../x", "/etc/passwd", "a/../b", "a//b", "a/b/c/d", "x:", ":x", "x:..", "x:../y", ".x", "-x", "x\x00", "x\ny",
    "\uff58", "x\u202e", "x" * 256, "~root", "%2e%2e", "..\\x", "hf.co/..", "hf.co/a/..", "con:nul/", " x",
]  # fmt: skip
DIGESTS = ["x", "sha256:", "sha256:" + "g" * 64, "sha256:" + "0" * 63, "sha256:" + "A" * 64, "inode:" + "0" * 64,
           "sha256:../../" + "0" * 58, "../" + "0" * 64, "sha512:" + "0" * 64]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaServed]:
    folder = tmp_path_factory.mktemp("outer")
    (folder / "kept").write_text("here before")
    with ollama(folder) as made:
        yield made


def everything(root: Path) -> dict[str, int]:
    """All files and their sizes, but for the lock and what is being written."""
    return {
        str(path.relative_to(root)): path.lstat().st_size
        for path in root.rglob("*")
        if path.is_file() and path.name != "lock" and "work" not in path.parts
    }


def ask(served: OllamaServed, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
    content = None if body is None else json.dumps(body).encode()
    return httpx.request(method, served.url + path, content=content, timeout=30)


def bodies(name: str) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        ("POST", "/api/show", {"model": name}),
        ("POST", "/api/generate", {"model": name, "prompt": "x"}),
        ("POST", "/api/generate", {"model": name, "keep_alive": 0}),
        ("POST", "/api/chat", {"model": name, "messages": [{"role": "user", "content": "x"}]}),
        ("POST", "/api/embed", {"model": name, "input": "x"}),
        ("POST", "/api/embeddings", {"model": name, "prompt": "x"}),
        ("POST", "/api/copy", {"source": name, "destination": "copied"}),
        ("POST", "/api/copy", {"source": "tiny", "destination": name}),
        ("DELETE", "/api/delete", {"model": name}),
        ("POST", "/api/pull", {"model": name, "stream": False}),
        ("POST", "/api/create", {"model": name, "from": "tiny", "stream": False}),
        ("POST", "/api/create", {"model": "made", "from": name, "stream": False}),
        ("POST", "/api/create", {"model": "made", "files": {name: "sha256:" + "0" * 64}, "stream": False}),
    ]


@pytest.mark.parametrize("name", BAD, ids=lambda name: ascii(name)[:20])
def test_no_route_takes_a_bad_name(served: OllamaServed, name: str) -> None:
    root = served.file.parent
    before = everything(root)
    for method, path, body in bodies(name):
        answer = ask(served, method, path, body)
        assert answer.status_code in (400, 404), (path, answer.status_code, answer.text)
        told = answer.json()
        assert set(told) == {"error"} and isinstance(told["error"], str) and "\n" not in told["error"]
    assert everything(root) == before


@settings(max_examples=25, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.text(min_size=1, max_size=40) | st.text("./:-_a\\%\x00~", min_size=1, max_size=12))
@example(name="tiny/../tiny")
def test_no_text_makes_a_route_fail(served: OllamaServed, name: str) -> None:
    root = served.file.parent
    before = everything(root)
    for method, path, body in bodies(name):
        if body.get("destination") == name or path == "/api/create":
            continue  # a good name may be made
        answer = ask(served, method, path, body)
        assert 400 <= answer.status_code < 500, (path, answer.status_code, answer.text)
        assert isinstance(answer.json()["error"], str)
    assert everything(root) == before


@settings(max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(digest=st.text(min_size=1, max_size=80) | st.sampled_from(DIGESTS))
@example(digest=DIGESTS[-3])
def test_no_digest_leads_out_of_the_store(served: OllamaServed, digest: str) -> None:
    root = served.file.parent
    before = everything(root)
    try:
        path = "/api/blobs/" + quote(digest, safe="")
    except UnicodeEncodeError:  # half of a character has no address
        return
    for method in ("HEAD", "POST"):
        answer = httpx.request(method, served.url + path, content=b"x" if method == "POST" else None, timeout=30)
        assert 400 <= answer.status_code < 500, (method, answer.status_code)
    assert everything(root) == before


def test_a_blob_whose_bytes_are_others_is_not_kept(served: OllamaServed) -> None:
    before = everything(served.file.parent)
    answer = httpx.post(served.url + "/api/blobs/sha256:" + "0" * 64, content=b"x" * 5000)
    assert answer.status_code == 400 and "send them again" in answer.json()["error"]
    assert everything(served.file.parent) == before
