"""What the load benchmark asks for, and what it makes of the answers. Plain Python: peers import it too."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

NUM_JOBS = 64
PROMPTS = (32, 512)  # tokens
ANSWERS = (16, 256)


@dataclass(frozen=True)
class Job:
    """One request: greedy, and exactly so many new tokens."""

    prompt: list[int]
    max_tokens: int


@dataclass
class Answer:
    """When it was asked and when its tokens came, in seconds of one clock. Servers may send several tokens at once."""

    asked: float
    num_prompt_tokens: int
    events: list[float] = field(default_factory=list)
    num_tokens: int = 0

    @property
    def first(self) -> float:
        return self.events[0] - self.asked

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.events, self.events[1:], strict=False)]


def mixed(text_ids: Sequence[int], seed: int, count: int = NUM_JOBS) -> list[Job]:
    """Slices of a text; lengths of prompts and answers are uniform in their ranges. Each seed has its own slices."""
    draw = random.Random(seed)
    jobs = []
    for _ in range(count):
        length = draw.randint(*PROMPTS)
        begin = draw.randrange(len(text_ids) - length)
        jobs.append(Job(list(text_ids[begin : begin + length]), draw.randint(*ANSWERS)))
    return jobs


def uniform(text_ids: Sequence[int], seed: int, *, count: int, prompt: int, answer: int) -> list[Job]:
    """Jobs of one size."""
    draw = random.Random(seed)
    begins = [draw.randrange(len(text_ids) - prompt) for _ in range(count)]
    return [Job(list(text_ids[begin : begin + prompt]), answer) for begin in begins]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so many are not above."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def rates(jobs: Sequence[Job], seconds: float) -> dict[str, float]:
    """Tokens per second of all jobs together."""
    new = sum(job.max_tokens for job in jobs)
    read = sum(len(job.prompt) for job in jobs)
    return {"seconds": seconds, "output_tok_s": new / seconds, "total_tok_s": (new + read) / seconds}


def latencies(answers: Sequence[Answer]) -> dict[str, float]:
    """Time to first token and between tokens, in seconds."""
    firsts = [answer.first for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps]
    return {
        "ttft_p50_s": percentile(firsts, 0.5),
        "ttft_p99_s": percentile(firsts, 0.99),
        "itl_p50_s": percentile(gaps, 0.5),
        "itl_p99_s": percentile(gaps, 0.99),
        "itl_max_s": max(gaps),
        "tokens_per_event": sum(a.num_tokens for a in answers) / sum(len(a.events) for a in answers),
    }


def check_lengths(jobs: Sequence[Job], answers: Sequence[Answer]) -> None:
    """Raises SystemExit if an answer is shorter or longer than it had to be: rates would mean nothing."""
    for job, answer in zip(jobs, answers, strict=True):
        if answer.num_tokens != job.max_tokens:
            raise SystemExit(f"an answer has {answer.num_tokens} tokens instead of {job.max_tokens}")


def dump(jobs: Sequence[Job]) -> str:
    return json.dumps([asdict(job) for job in jobs])


def load(text: str) -> list[Job]:
    return [Job(**job) for job in json.loads(text)]


def median_of(runs: Sequence[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))
