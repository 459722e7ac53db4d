"""Running llama.cpp's programs as the peer to compare with. Every path comes from the caller."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any


def run(command: list[str]) -> str:
    """Standard output of a program.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}):\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


def prefill_speed(bin_dir: Path, model: Path, *, tokens: int, threads: int, repack: int) -> float:
    """Tokens per second of one prompt, by llama-bench, which runs a warm-up first."""
    command = [str(bin_dir / "llama-bench"), "-m", str(model), "-p", str(tokens), "-n", "0", "-r", "1"]
    command += ["-t", str(threads), "--repack", str(repack), "-o", "json"]
    return float(json.loads(run(command))[0]["avg_ts"])


def decode_speeds(
    bin_dir: Path, model: Path, *, prompt: int, tokens: int, streams: list[int], threads: int, repack: int
) -> dict[int, float]:
    """Generated tokens per second of all streams together, per number of streams, by llama-batched-bench."""
    command = [str(bin_dir / "llama-batched-bench"), "-m", str(model), "-npp", str(prompt), "-ntg", str(tokens)]
    command += ["-npl", ",".join(map(str, streams)), "-c", str(max(streams) * (prompt + tokens))]
    command += ["-t", str(threads), "-tb", str(threads), "--repack" if repack else "--no-repack"]
    rows = [json.loads(line) for line in run([*command, "--output-format", "jsonl"]).splitlines() if _is_row(line)]
    speeds = {int(row["pl"]): float(row["speed_tg"]) for row in rows}
    if sorted(speeds) != sorted(streams):
        raise SystemExit(f"llama-batched-bench measured {sorted(speeds)} streams, asked for {streams}")
    return speeds


def _is_row(line: str) -> bool:
    return line.startswith("{") and '"speed_tg"' in line


@dataclass(frozen=True)
class PeerPerplexity:
    perplexity: float
    std_error: float
    windows: int


def read_perplexity(log: str) -> PeerPerplexity:
    """The figures in what llama-perplexity printed."""
    final = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", log)
    windows = re.search(r"perplexity over (\d+) chunks", log)
    if final is None or windows is None:
        raise SystemExit(f"llama-perplexity printed no final figure:\n{log[-1000:]}")
    return PeerPerplexity(float(final[1]), float(final[2]), int(windows[1]))


def perplexity_log(bin_dir: Path, model: Path, text: Path, *, ctx: int, windows: int, threads: int) -> str:
    """Everything that llama-perplexity prints."""
    command = [str(bin_dir / "llama-perplexity"), "-m", str(model), "-f", str(text), "-c", str(ctx)]
    command += ["--chunks", str(windows), "-t", str(threads)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    return done.stdout + done.stderr


@dataclass(frozen=True)
class PeerToken:
    """A token that llama.cpp chose, the runner-up, and by how many logits it lost."""

    token_id: int
    second_id: int
    gap: float


class LlamaServer:
    """llama-server on a free port of this machine, for one model; use it in a with statement."""

    def __init__(self, bin_dir: Path, model: Path, *, threads: int, context: int = 2048) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")  # noqa: SIM115 - closed in __exit__
        command = [str(bin_dir / "llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
        command += ["-t", str(threads), "-c", str(context), "-np", "1", "--cache-ram", "0", "--offline"]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT)

    def __enter__(self) -> LlamaServer:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(self._url + "/health", timeout=5):
                    return self
            except OSError:
                time.sleep(0.2)
        self.__exit__(None, None, None)
        raise SystemExit("llama-server did not start")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def tokenize(self, text: str, *, parse_special: bool) -> list[int]:
        """Token ids, with BOS where the model asks for one."""
        asked = {"content": text, "add_special": True, "parse_special": parse_special}
        return [int(token_id) for token_id in self._post("/tokenize", asked)["tokens"]]

    def greedy(self, prompt: list[int], max_tokens: int) -> list[PeerToken]:
        """Greedy continuation, computed without any cache of earlier prompts."""
        asked = {"prompt": prompt, "n_predict": max_tokens, "temperature": 0, "n_probs": 2, "cache_prompt": False}
        rows = self._post("/completion", asked)["completion_probabilities"]
        tokens = []
        for row in rows:
            first, second = sorted(row["top_logprobs"], key=lambda top: -top["logprob"])[:2]
            # A difference of log-probabilities is a difference of logits.
            gap = first["logprob"] - second["logprob"]
            runner_up = second["id"] if second["id"] != row["id"] else first["id"]
            tokens.append(PeerToken(int(row["id"]), int(runner_up), float(gap)))
        return tokens

    def _post(self, path: str, body: dict[str, object]) -> Any:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
