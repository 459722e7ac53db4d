"""A server on this machine that speaks as much of the Hugging Face hub's protocol as a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789" * 4


@dataclass(slots=True)
class FakeHub:
    """Repositories of files, and what is to go wrong.

    cut: how many bytes of each answer's body are sent before the connection is closed, one number for each answer that
    is to be cut. requests: method, path and Range of each that came.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    url: str = ""
    cut: list[int] = field(default_factory=list)
    damaged: bool = False
    redirect: bool = False
    gated: bool = False
    stall: threading.Event | None = None  # a body waits for it in the middle
    halfway: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    other_host: str = ""  # where a redirect leads
    seen_tokens: list[str | None] = field(default_factory=list)  # by the other host

    def downloads(self) -> list[str | None]:
        """The Range of each download of a body."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and "/api/" not in path]


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None: ...

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            hub.requests.append((self.command, self.path, self.headers.get("Range")))
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/"):
                name = path.removeprefix("/api/models/").partition("/revision/")[0]
                files = hub.repositories.get(name)
                if files is None:
                    self._fail(404, "RepoNotFound")
                    return
                info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files], "tags": []}
                if "/tree/" in path:
                    info = []  # type: ignore[assignment]
                self._send(json.dumps(info).encode(), {"Content-Type": "application/json"})
            elif path.startswith("/elsewhere/"):
                hub.seen_tokens.append(self.headers.get("Authorization"))
                name, _, file = path.removeprefix("/elsewhere/").partition("/resolve/")
                self._body(hub.repositories[name][file])
            else:
                self._file(path)

        def _file(self, path: str) -> None:
            name, _, rest = path.lstrip("/").partition("/resolve/")
            content = hub.repositories.get(name, {}).get(rest.partition("/")[2])
            if content is None:
                self._fail(404, "EntryNotFound")
            elif hub.gated:
                self._fail(403, "GatedRepo")
            elif hub.redirect:
                self.send_response(302)
                target = f"{hub.other_host}/elsewhere/{name}/resolve/{rest.partition('/')[2]}"
                for key, value in {**_facts(content), "Location": target, "Content-Length": "0"}.items():
                    self.send_header(key, value)
                self.end_headers()
            else:
                self._body(content)

        def _body(self, content: bytes) -> None:
            begin = 0
            wanted = self.headers.get("Range")
            if wanted:
                begin = int(wanted.removeprefix("bytes=").partition("-")[0])
            body = content[begin:]
            if hub.damaged:
                body = bytes(len(body))
            headers = _facts(content)
            if wanted:
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            self._send(body, headers, status=206 if wanted else 200)

        def _send(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            is_file = "X-Repo-Commit" in headers
            if is_file and hub.cut:
                self.wfile.write(body[: hub.cut.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
                return
            if is_file and hub.stall is not None:
                self.wfile.write(body[: len(body) // 2])
                self.wfile.flush()
                hub.halfway.set()
                hub.stall.wait(30)
                body = body[len(body) // 2 :]
            self.wfile.write(body)

        def _fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


def _facts(content: bytes) -> dict[str, str]:
    digest = hashlib.sha256(content).hexdigest()
    return {
        "ETag": f'"{digest}"',
        "X-Linked-Etag": f'"{digest}"',
        "X-Linked-Size": str(len(content)),
        "X-Repo-Commit": COMMIT,
        "Accept-Ranges": "bytes",
    }


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """The hub on a free port of 127.0.0.1; `other_host` is the same server under another name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, name="hub")
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.other_host = f"http://localhost:{server.server_port}"
    try:
        yield hub
    finally:
        if hub.stall is not None:
            hub.stall.set()
        server.shutdown()
        server.server_close()
        thread.join()
