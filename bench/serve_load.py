#!/usr/bin/env python3
"""nybble under load, beside other engines: tokens per second, waits, what HTTP costs, what a shared prefix saves.

A run is one PIECE, short enough to have the machine to itself; it adds one line of JSON to --runs. Take the pieces in
turns, round by round, each round with its own --seed, then let serve_report.py make the tables.

    python bench/serve_load.py PIECE MODEL.gguf --text FILE --runs runs.jsonl [--seed N] [options]

The mixed workload is 64 requests, prompts of 32 to 512 tokens, answers of 16 to 256, greedy, all sent at once:
    offline       LLM.generate, in this process
    http          nybble serve, streamed
    plain         the same with --speculate off: greedy texts repeat themselves, which other engines gain nothing from
    llama         llama-server -np 32, streamed the same way (--llama-bin)
    transformers, vllm, openvino
                  in an interpreter of their own (--peer-python, --peer-model)
The others:
    streams       32 streams at once over HTTP and offline, in turns: what HTTP costs
    prefix        time to first token after a shared prefix of 2,000 tokens, when it is new and when it was seen
    arrival       the time between two tokens of 8 streams while prompts of 2,000 tokens arrive
    native        how much of a step at batch 1 (and 32) is spent in native code
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from serve_client import ask, metrics
from serve_engines import NAME, generate, llama_server, nybble_server, peak_bytes, peer, timed, warm, watched
from serve_workload import NUM_JOBS, Answer, Job, latencies, mixed, percentile, rates, uniform

from nybble import LLM
from nybble.backends.cpu import default_threads

SLOTS = 32  # of llama-server
CONTEXT = 1024  # of one sequence of the mixed workload
STREAMS = {"count": 32, "prompt": 64, "answer": 128}
PREFIX, SUFFIX = 2000, 16
Piece = dict[str, Any]


def offline(args: argparse.Namespace, ids: list[int]) -> Piece:
    jobs = mixed(ids, args.seed, args.jobs)
    llm = LLM(args.model, threads=args.threads, max_model_len=CONTEXT)
    generate(llm, [Job(jobs[0].prompt[:40], 4)])
    return rates(jobs, generate(llm, jobs))


def http(args: argparse.Namespace, ids: list[int]) -> Piece:
    jobs = mixed(ids, args.seed, args.jobs)
    mode = "off" if args.piece == "plain" else "auto"
    with nybble_server(args.model, args.threads, "--ctx", str(CONTEXT), "--speculate", mode) as (url, pid):
        warm(url)
        before = metrics(url)
        with watched(url) as seen:
            seconds, answers = timed(url, jobs)
        after = metrics(url)
        peak = peak_bytes(pid)
    waste = [one["nybble_kv_cache_waste_ratio"] for one in seen if one["nybble_num_requests_running"] > 0]
    model = after["nybble_model_seconds_total"] - before["nybble_model_seconds_total"]
    return {
        **rates(jobs, seconds),
        **latencies(answers),
        "kv_waste_mean": statistics.mean(waste),
        "kv_waste_max": max(waste),
        "preemptions": after["nybble_preemptions_total"] - before["nybble_preemptions_total"],
        "model_share": model / seconds,
        "peak_bytes": peak,
    }


def llama(args: argparse.Namespace, ids: list[int]) -> Piece:
    jobs = mixed(ids, args.seed, args.jobs)
    with llama_server(args.llama_bin, args.model, args.threads, slots=SLOTS, context=SLOTS * CONTEXT) as (url, pid):
        warm(url)
        seconds, answers = timed(url, jobs)
        peak = peak_bytes(pid)
    return {**rates(jobs, seconds), **latencies(answers), "peak_bytes": peak}


def other(args: argparse.Namespace, ids: list[int]) -> Piece:
    jobs = mixed(ids, args.seed, args.jobs)
    return peer(args.peer_python, args.piece, args.peer_model, args.threads, jobs, args.budget)


def streams(args: argparse.Namespace, ids: list[int]) -> Piece:
    """Server and LLM are both there all the time, and only one of them works."""
    options = ["--ctx", str(CONTEXT), "--kv-cache-memory", "1GiB"]
    rounds = []
    llm = LLM(args.model, threads=args.threads, max_model_len=CONTEXT, kv_cache_memory="1GiB")
    with nybble_server(args.model, args.threads, *options) as (url, _):
        warm(url)
        generate(llm, [Job(ids[:40], 4)])
        for number in range(args.repeat):
            jobs = uniform(ids, args.seed * 1000 + number, **STREAMS)
            begin = time.perf_counter()
            offline_seconds = generate(llm, jobs)
            http_seconds, answers = timed(url, jobs)
            if number % 2:  # who goes first must not matter
                jobs = uniform(ids, args.seed * 1000 + number + 500, **STREAMS)
                http_seconds, answers = timed(url, jobs)
                offline_seconds = generate(llm, jobs)
            rounds.append(
                {
                    "offline": rates(jobs, offline_seconds)["output_tok_s"],
                    "http": rates(jobs, http_seconds)["output_tok_s"],
                    "overhead": http_seconds / offline_seconds - 1,
                    "seconds": time.perf_counter() - begin,
                    **latencies(answers),
                }
            )
    return {"rounds": rounds, "overhead": statistics.median(one["overhead"] for one in rounds)}


def prefix(args: argparse.Namespace, ids: list[int]) -> Piece:
    """nybble, and llama-server with its own prompt cache if --llama-bin is given."""
    found = {}
    with nybble_server(args.model, args.threads, "--ctx", "4096") as (url, _):
        found["nybble"] = _prefix_times(url, ids, args)
    if args.llama_bin is not None:
        with llama_server(args.llama_bin, args.model, args.threads, slots=1, context=4096) as (url, _):
            found["llama"] = _prefix_times(url, ids, args)
    return found


def _prefix_times(url: str, ids: list[int], args: argparse.Namespace) -> Piece:
    warm(url)
    misses, hits = [], []
    for number in range(args.repeat):
        [shared] = uniform(ids, args.seed * 1000 + number, count=1, prompt=PREFIX, answer=2)
        ends = uniform(ids, args.seed * 1000 + number, count=4, prompt=SUFFIX, answer=2)
        times = [
            asyncio.run(ask(url, NAME, Job([*shared.prompt, end.prompt[0] ^ place, *end.prompt[1:]], 2))).first
            for place, end in enumerate(ends)
        ]
        misses.append(times[0])
        hits += times[1:]
    miss, hit = statistics.median(misses), statistics.median(hits)
    return {"miss_s": miss, "hit_s": hit, "ratio": miss / hit, "misses": misses, "hits": hits}


def arrival(args: argparse.Namespace, ids: list[int]) -> Piece:
    """Streams alone for a while, then beside long prompts that come one after the other."""

    async def run(url: str) -> tuple[list[Answer], list[float]]:
        jobs = uniform(ids, args.seed, count=8, prompt=32, answer=400)
        running = [asyncio.create_task(ask(url, NAME, job)) for job in jobs]
        await asyncio.sleep(4)
        begins = []
        for number in range(3):
            begins.append(time.perf_counter())
            [long] = uniform(ids, args.seed * 1000 + number, count=1, prompt=PREFIX, answer=2)
            begins.append((await ask(url, NAME, long)).events[0])
            await asyncio.sleep(1)
        return await asyncio.gather(*running), begins

    with nybble_server(args.model, args.threads, "--ctx", "4096", "--speculate", "off") as (url, _):
        warm(url)
        answers, times = asyncio.run(run(url))
    spans = list(zip(times[::2], times[1::2], strict=True))
    beside: list[float] = []
    alone: list[float] = []
    for answer in answers:
        for begin, end in zip(answer.events, answer.events[1:], strict=False):
            is_beside = any(begin < last and end > first for first, last in spans)
            (beside if is_beside else alone).append(end - begin)
    return {
        "long_ttft_s": [last - first for first, last in spans],
        **{f"alone_{name}_s": percentile(alone, share) for name, share in (("p50", 0.5), ("p99", 0.99))},
        **{f"beside_{name}_s": percentile(beside, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1))},
    }


def native(args: argparse.Namespace, ids: list[int]) -> Piece:
    """The time of `LLM.generate` that passes outside of the model's native calls, prefill included."""
    llm = LLM(args.model, threads=args.threads, max_model_len=CONTEXT, speculate="off")
    model: Any = llm._core._model
    inside = [0.0]

    def timed_call(name: str) -> None:
        call = getattr(model, name)

        def wrapped(*given: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                inside[0] += time.perf_counter() - begin

        setattr(model, name, wrapped)

    for name in ("execute", "sample", "copy_blocks"):
        timed_call(name)
    found = {}
    for count in (1, 32):
        jobs = uniform(ids, args.seed, count=count, prompt=32, answer=200)
        generate(llm, [Job(job.prompt[:16], 2) for job in jobs])
        inside[0] = 0.0
        seconds = generate(llm, jobs)
        found[f"outside_b{count}"] = 1 - inside[0] / seconds
        found[f"step_ms_b{count}"] = 1000 * seconds / 200
    return found


PIECES = {
    "offline": offline, "http": http, "plain": http, "llama": llama,
    "transformers": other, "vllm": other, "openvino": other,
    "streams": streams, "prefix": prefix, "arrival": arrival, "native": native,
}  # fmt: skip


def token_ids(model: Path, text: Path) -> list[int]:
    """The ids that every engine is given, so that no tokenizer is measured."""
    from nybble.checkpoint import open_checkpoint
    from nybble.tokenizer import load_tokenizer

    return load_tokenizer(open_checkpoint(model).tokenizer).encode(text.read_text("utf-8")[:400_000], add_special=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=PIECES)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--text", type=Path, required=True, help="where the prompts are cut from")
    parser.add_argument("--runs", type=Path, help="file of results, one line each, that this one is added to")
    parser.add_argument("--seed", type=int, default=0, help="of the workload; one for each round")
    parser.add_argument("--jobs", type=int, default=NUM_JOBS)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--repeat", type=int, default=3, help="rounds inside of streams and prefix")
    parser.add_argument("--llama-bin", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--peer-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--peer-model", type=Path, help="folder of the same model in the peer's format")
    parser.add_argument("--budget", type=float, default=120, help="seconds for transformers")
    args = parser.parse_args()
    ids = token_ids(args.model, args.text)
    figures = PIECES[args.piece](args, ids)
    run = {
        "piece": args.piece,
        "model": args.model.stem,
        "seed": args.seed,
        "jobs": args.jobs,
        "threads": args.threads,
        **figures,
    }
    if args.runs:
        with args.runs.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
    print(json.dumps(run))


if __name__ == "__main__":
    main()
