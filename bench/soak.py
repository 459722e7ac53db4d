#!/usr/bin/env python3
"""Two thousand requests at sixteen at once on a real server, with clients that leave and bodies that are wrong.

    python bench/soak.py MODEL [--requests 2000] [--at-once 16] [--kv-cache-memory 16MiB]

Afterwards every answer that was read to its end is the one that the same request gets from an engine of its own, parts
of answers are their beginnings, wrong bodies got a 4xx, no block of the cache is in use, and memory is as it was after
the first quarter. The last line is a JSON document; the exit status is 1 if something is not so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_client import metrics
from serve_engines import NAME, nybble_server, rss_bytes

from nybble import LLM, SamplingParams
from nybble.backends.cpu import default_threads
from nybble.store import resolve

CONTEXT = 256
WORDS = ("time", "way", "year", "work", "day", "part", "house", "point", "home", "water", "room", "money", "story")
KINDS = {"whole": 50, "streamed": 20, "left": 15, "left at once": 10, "wrong": 5}
WRONG: list[Any] = [
    b"{", b"[]", b"\xff\xfe", b'{"model": "load"}', b'{"model": "load", "prompt": [1000000000]}',
    b'{"model": "load", "prompt": "x", "unknown": 1}', b'{"model": "other", "prompt": "x"}',
    b'{"model": "load", "prompt": [%s]}' % b",".join([b"7"] * (CONTEXT + 1)), b'{"model":' + b"[" * 2000,
]  # fmt: skip


@dataclass(frozen=True)
class Asked:
    body: dict[str, Any]
    text: str


def catalogue(model: Path, threads: int, count: int) -> list[Asked]:
    """Different requests with their answers, each computed alone and without a prefix cache."""
    draw = random.Random(1)
    llm = LLM(
        model, threads=threads, max_model_len=CONTEXT, kv_cache_memory="64MiB", enable_prefix_caching=False,
        speculate="off",
    )  # fmt: skip
    shared = " ".join(draw.choices(WORDS, k=60))
    found = []
    for number in range(count):
        prompt = (shared if number % 3 == 0 else "") + " ".join(draw.choices(WORDS, k=draw.randint(1, 80)))
        values: dict[str, Any] = {
            "max_tokens": draw.randint(1, 60), "temperature": 0.0 if number % 2 else 0.8, "seed": number,
            "ignore_eos": True,
        }  # fmt: skip
        [output] = llm.generate(prompt, SamplingParams(**values), use_tqdm=False)
        found.append(Asked({"model": NAME, "prompt": prompt, **values}, output.outputs[0].text))
    return found


class Soak:
    """One run against a server."""

    def __init__(self, port: int, asked: list[Asked]) -> None:
        self.port = port
        self.asked = asked
        self.ends: Counter[str] = Counter()
        self.problems: list[str] = []

    async def request(self, draw: random.Random) -> None:
        """One request, of a kind that is drawn, and what must be true of its answer."""
        [kind] = draw.choices(list(KINDS), list(KINDS.values()))
        asked = draw.choice(self.asked)
        if kind == "wrong":
            status, body = await self._post(draw.choice(WRONG))
            ok = 400 <= status < 500 and b'"error"' in body
        elif kind == "left at once":
            _, writer = await self._send(json.dumps(asked.body | {"stream": draw.random() < 0.5}).encode())
            await asyncio.sleep(draw.random() * 0.02)
            writer.close()
            ok = True
        elif kind == "whole":
            status, body = await self._post(json.dumps(asked.body).encode())
            ok = status == 200 and json.loads(body)["choices"][0]["text"] == asked.text
        else:
            text, ended = await self._stream(asked.body, draw.randint(1, 20) if kind == "left" else None)
            ok = text == asked.text if ended else asked.text.startswith(text)
        self.ends[kind] += 1
        if not ok:
            self.problems.append(f"{kind}: {json.dumps(asked.body)[:200]}")

    async def _send(self, content: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        return reader, writer

    async def _post(self, content: bytes) -> tuple[int, bytes]:
        reader, writer = await self._send(content)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), body

    async def _stream(self, body: dict[str, Any], leave_after: int | None) -> tuple[str, bool]:
        """The text, and whether it was read to its end."""
        reader, writer = await self._send(json.dumps(body | {"stream": True}).encode())
        text, events = "", 0
        try:
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                    events += 1
                    if events == leave_after:
                        return text, False
                elif line.startswith(b"data: [DONE]"):
                    return text, True
            return text, False
        finally:
            writer.close()


async def run(soak: Soak, count: int, at_once: int, seed: int) -> None:
    draw = random.Random(seed)
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            await soak.request(draw)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(worker())


def settle(url: str) -> dict[str, float]:
    """The metrics when nothing runs any more."""
    for _ in range(100):
        seen = metrics(url)
        if seen["nybble_num_requests_running"] + seen["nybble_num_requests_waiting"] == 0:
            break
        time.sleep(0.1)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file, a folder or a name of the catalog")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--kv-cache-memory", default="16MiB", help="little, so that requests have to give way")
    parser.add_argument("--threads", type=int, default=default_threads())
    args = parser.parse_args()
    path = resolve(args.model)
    asked = catalogue(path, args.threads, 60)
    options = ["--ctx", str(CONTEXT), "--kv-cache-memory", args.kv_cache_memory]
    begin = time.monotonic()
    memory = []
    with nybble_server(path, args.threads, *options) as (url, pid):
        soak = Soak(int(url.rsplit(":", 1)[1]), asked)
        for quarter in range(4):
            asyncio.run(run(soak, args.requests // 4, args.at_once, quarter))
            seen = settle(url)
            memory.append(rss_bytes(pid))
            print(f"{sum(soak.ends.values())} requests, {memory[-1] / 1e6:.0f} MB", file=sys.stderr, flush=True)
    problems = list(soak.problems)
    if (
        seen["nybble_kv_cache_usage_ratio"]
        or seen["nybble_num_requests_running"]
        or seen["nybble_num_requests_waiting"]
    ):
        problems.append("something is still in the engine")
    if memory[-1] > memory[0] * 1.02 + 4e6:
        problems.append(f"memory grew from {memory[0]} to {memory[-1]} bytes")
    result = {
        "model": Path(path).stem,
        "requests": dict(soak.ends),
        "seconds": time.monotonic() - begin,
        "preemptions": seen["nybble_preemptions_total"],
        "prefix_hit_ratio": seen["nybble_prefix_cache_hit_ratio"],
        "rss_bytes": memory,
        "problems": problems,
    }
    print(json.dumps(result))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
