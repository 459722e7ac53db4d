#!/usr/bin/env python3
"""How long a user waits: for the first token of `nybble run`, for a server that is warm, for `nybble create`.

- run: from the start of the process to the first byte of the answer, the model file in the page cache.
- server: from sending a request to the first event of its answer, less what the engine itself says about the same
  requests (its histogram of times to the first token), on a server without a model that has answered before.
- create: of a model FROM a file, into an empty store on the same disk; whether it is the same file afterwards.

    python bench/local.py [--rounds 7] [--out docs/benchmarks] MODEL.gguf ...
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nybble import __version__

PROMPT = "Write a short note about the river near the town."
FIRST_TOKEN_TARGETS = {"qwen0.5b": 1.0, "smollm2-135m": 0.5}  # seconds
OVERHEAD_TARGET = 0.050
CREATE_TARGET = 1.0
NYBBLE = [str(Path(sys.executable).with_name("nybble"))]
# An installed nybble has its bytecode; without this a checkout may be compiled at each start.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def first_token(model: Path) -> float:
    """Seconds from the start of `nybble run` to the first byte of its answer."""
    begin = time.perf_counter()
    command = [*NYBBLE, "run", str(model), PROMPT, "--max-tokens", "2", "--temperature", "0", "--raw"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if not process.stdout.read(1):
            raise SystemExit(f"{model} gives no answer")
        seconds = time.perf_counter() - begin
        process.stdout.read()
    return seconds


def create(model: Path, home: Path) -> tuple[float, bool]:
    """Seconds of `nybble create`, and whether the store's file is the same one."""
    environment = {**ENVIRONMENT, "NYBBLE_HOME": str(home)}
    begin = time.perf_counter()
    subprocess.run(
        [*NYBBLE, "create", model.stem, "-f", "-"],
        input=f"FROM {model}\n".encode(),
        env=environment,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - begin
    return seconds, any(blob.samefile(model) for blob in (home / "blobs").iterdir())


class Server:
    """`nybble serve` over the models of a store, on a port of its own."""

    def __init__(self, home: Path) -> None:
        command = [*NYBBLE, "serve", "--port", "0", "--ctx", "2048"]
        self._process = subprocess.Popen(
            command, env={**ENVIRONMENT, "NYBBLE_HOME": str(home)}, stderr=subprocess.PIPE, text=True
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if found := re.search(r"at http://127\.0\.0\.1:(\d+)", line):
                self._port = int(found[1])
                return
        raise SystemExit("the server did not start")

    def ask(self, model: str, prompt: str) -> float:
        """Seconds to the first event of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        body = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True}
        begin = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200 or not answer.readline():
            raise SystemExit(f"the server refused: {answer.status} {answer.read()!r:.300}")
        seconds = time.perf_counter() - begin
        answer.read()
        connection.close()
        return seconds

    def engine_seconds(self) -> tuple[float, int]:
        """The sum and the number of all times to the first token, as the engine has them."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        name = "nybble_time_to_first_token_seconds"
        total, count = (
            sum(float(value) for value in re.findall(rf"^{name}_{kind}(?:{{.*}})? (\S+)$", text, re.MULTILINE))
            for kind in ("sum", "count")
        )
        return total, int(count)

    def stop(self) -> None:
        self._process.terminate()
        self._process.communicate(timeout=60)


def overhead(server: Server, name: str, count: int) -> dict[str, Any]:
    """What the server adds to the engine's own time to the first token, over `count` requests."""
    server.ask(name, PROMPT)  # loads it
    before = server.engine_seconds()
    times = [server.ask(name, f"{number}. {PROMPT}") for number in range(count)]
    after = server.engine_seconds()
    if after[1] - before[1] != count:
        raise SystemExit("the engine counted other requests too")
    own = (after[0] - before[0]) / count
    mean = statistics.mean(times)
    return {"ttft_s": spread(times), "mean_s": mean, "engine_mean_s": own, "overhead_s": mean - own}


def measure(model: Path, rounds: int, folder: Path) -> dict[str, Any]:
    first_token(model)  # into the page cache
    found: dict[str, Any] = {
        "model": model.name,
        "bytes": model.stat().st_size,
        "first_token_s": spread([first_token(model) for _ in range(rounds)]),
    }
    created = [create(model, folder / f"{model.stem}-{number}") for number in range(rounds)]
    found["create_s"] = spread([seconds for seconds, _ in created])
    found["is_same_file"] = all(same for _, same in created)
    server = Server(folder / f"{model.stem}-0")
    try:
        found["server"] = overhead(server, model.stem, 3 * rounds)
    finally:
        server.stop()
    print(f"{model.stem} done", file=sys.stderr, flush=True)
    return found


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "# How long a user waits",
        "",
        f"nybble {report['version']}, `{report['command']}` on {report['cpu']} with {report['cores']} cores; "
        f"{report['rounds']} rounds, medians (least to most). Targets: first token of `nybble run` "
        + " and ".join(f"{seconds:g} s for {name}" for name, seconds in FIRST_TOKEN_TARGETS.items())
        + f"; a warm server {OVERHEAD_TARGET * 1e3:.0f} ms over the engine; `create` {CREATE_TARGET:g} s and no copy.",
        "",
        "| model | file | `run`, first token | `create` | same file | warm server | over the engine's own |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in report["models"]:
        server = one["server"]
        lines.append(
            f"| {one['model']} | {one['bytes'] / 1e9:.2f} GB | {_seconds(one['first_token_s'])} | "
            f"{_seconds(one['create_s'])} | {'yes' if one['is_same_file'] else 'NO'} | {_seconds(server['ttft_s'])} | "
            f"{server['overhead_s'] * 1e3:.1f} ms |"
        )
    return "\n".join(lines) + "\n"


def _seconds(one: dict[str, float]) -> str:
    return f"{one['median']:.3f} s ({one['min']:.3f} to {one['max']:.3f})"


def _cpu() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else "an unknown processor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder of the reports; none are written without it")
    args = parser.parse_args()
    # Beside the models: a hard link needs the same disk.
    with tempfile.TemporaryDirectory(dir=args.models[0].parent) as folder:
        report = {
            "version": __version__,
            "command": "bench/local.py " + " ".join(path.name for path in args.models),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "rounds": args.rounds,
            "models": [measure(path.resolve(), args.rounds, Path(folder)) for path in args.models],
        }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "local.md").write_text(as_markdown(report))
        (args.out / "local.json").write_text(json.dumps(report, indent=1) + "\n")
    print(as_markdown(report), file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
