"""A client for streamed completions that takes next to no processor time, because server and client share the machine.

It speaks just the HTTP/1.1 that such answers need: chunks of server-sent events, a connection for each request.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from urllib.parse import urlsplit

from serve_workload import Answer, Job


async def ask(url: str, model: str, job: Job, *, path: str = "/v1/completions") -> Answer:
    """Stream one completion.

    Raises:
        SystemExit: the server refused it.
    """
    body = {
        "model": model,
        "prompt": job.prompt,
        "max_tokens": job.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    where = urlsplit(url)
    content = json.dumps(body).encode()
    answer = Answer(time.perf_counter(), len(job.prompt))
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=2**20)
    try:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        )
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        status = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in status.split(b"\r\n", 1)[0]:
            raise SystemExit(f"{status.decode()}{(await reader.read()).decode()[:500]}")
        async for event in _events(reader):
            now = time.perf_counter()
            if event == b"[DONE]":
                break
            if b'"usage":{' in event:  # counts, in the last event or in one of its own
                answer.num_tokens = json.loads(event)["usage"]["completion_tokens"]
            if b'"choices":[]' not in event:
                answer.events.append(now)
    finally:
        writer.close()
    return answer


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    buffer = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        buffer += (await reader.readexactly(size + 2))[:-2]
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield event[6:]


async def ask_all(url: str, model: str, jobs: Sequence[Job]) -> list[Answer]:
    """All at once."""
    return list(await asyncio.gather(*(ask(url, model, job) for job in jobs)))


def metrics(url: str) -> dict[str, float]:
    """The figures of a nybble server, without histograms."""
    with urllib.request.urlopen(url + "/metrics", timeout=30) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#") and "{" not in line]
    return {name: float(value) for name, value in (line.split() for line in lines)}
