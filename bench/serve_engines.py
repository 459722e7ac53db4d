"""Starting what is measured: nybble's server, llama-server, and peers in interpreters of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serve_client import ask_all, metrics
from serve_workload import Answer, Job, check_lengths, dump

from nybble import LLM, SamplingParams

_HERE = Path(__file__).parent
_START_SECONDS = 180
_SAMPLE_SECONDS = 0.5
NAME = "load"  # of the model, for servers that want one


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(command: Sequence[str], url: str, ready: str) -> Iterator[int]:
    """A server, from when it is ready until it has ended; its process id. Its log is shown if it does not start."""
    with tempfile.TemporaryFile(mode="w+", errors="replace") as log:
        running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _answers(url + ready):
                if running.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{command[0]} did not start:\n{log.read()[-2000:]}")
                time.sleep(0.2)
            yield running.pid
        finally:
            running.terminate()
            running.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


@contextmanager
def nybble_server(model: Path, threads: int, *options: str) -> Iterator[tuple[str, int]]:
    """Address and process id of `nybble serve`, with its defaults but for `options`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-c", "from nybble.cli.app import main; main()", "serve", str(model)]
    command += ["--port", str(port), "--served-model-name", NAME, "--threads", str(threads), *options]
    with process(command, url, "/ready") as pid:
        yield url, pid


@contextmanager
def llama_server(bin_dir: Path, model: Path, threads: int, *, slots: int, context: int) -> Iterator[tuple[str, int]]:
    """Address and process id of llama-server, with `slots` slots that share a cache of `context` tokens."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(bin_dir / "llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", str(threads), "-tb", str(threads), "-np", str(slots), "-c", str(context), "-cb", "-kvu"]
    with process([*command, "--cache-ram", "0", "--offline"], url, "/health") as pid:
        yield url, pid


def timed(url: str, jobs: Sequence[Job]) -> tuple[float, list[Answer]]:
    """Send all at once; seconds until the last has ended, and the answers."""
    begin = time.perf_counter()
    answers = asyncio.run(ask_all(url, NAME, jobs))
    seconds = time.perf_counter() - begin
    check_lengths(jobs, answers)
    return seconds, answers


def warm(url: str) -> None:
    """One short answer, so that nothing is done for the first time in the measurement."""
    asyncio.run(ask_all(url, NAME, [Job(list(range(100, 140)), 4)]))


@contextmanager
def watched(url: str) -> Iterator[list[dict[str, float]]]:
    """The metrics of a nybble server, taken now and then."""
    seen: list[dict[str, float]] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            with contextlib.suppress(OSError):
                seen.append(metrics(url))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def generate(llm: LLM, jobs: Sequence[Job]) -> float:
    """Seconds that `LLM.generate` takes."""
    params = [SamplingParams(temperature=0, max_tokens=job.max_tokens, ignore_eos=True) for job in jobs]
    begin = time.perf_counter()
    outputs = llm.generate([job.prompt for job in jobs], params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    for job, output in zip(jobs, outputs, strict=True):
        if len(output.outputs[0].token_ids) != job.max_tokens:
            raise SystemExit(f"an answer has {len(output.outputs[0].token_ids)} tokens instead of {job.max_tokens}")
    return seconds


def peer(python: Path, engine: str, model: Path, threads: int, jobs: Sequence[Job], budget: float) -> dict[str, Any]:
    """What `serve_peers.py` measured in another interpreter.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    command = [str(python), str(_HERE / "serve_peers.py"), engine, str(model), str(threads), str(budget)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(command, input=dump(jobs), capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{engine} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-3000:]}")
    found: dict[str, Any] = json.loads([line for line in done.stdout.splitlines() if line.startswith('{"seconds"')][-1])
    return found


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had so far (Linux)."""
    return _status_bytes(pid, "VmHWM")


def rss_bytes(pid: int) -> int:
    """The memory that a process has now (Linux)."""
    return _status_bytes(pid, "VmRSS")


def _status_bytes(pid: int, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))
