"""How fast a model runs: prompts read and tokens generated per second, for batches of any size.

`pp{P}@b{B}` reads B prompts of P tokens, up to the first new token of each. `tg{N}@b{B}` generates N tokens on B
sequences at once, each after a prompt of 128 tokens, which is not part of the time. All through the engine's own loop
with greedy sampling, so scheduling and sampling are in the figure.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from time import perf_counter

from nybble import __version__
from nybble.core.errors import ConfigError
from nybble.core.sampling import SamplingParams
from nybble.engine.generate import Generator
from nybble.engine.load import LoadedModel
from nybble.engine.roofline import ModelCost, Roofline, decode_fraction, model_cost, prefill_fraction
from nybble.engine.scheduler import PREFILL_BESIDE_DECODE, blocks_for

METRICS_VERSION = 2  # goes up when a figure changes its meaning
DECODE_PROMPT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class SpeedTest:
    """One cell of the table."""

    kind: str  # "pp" or "tg"
    num_tokens: int  # per sequence: prompt tokens of pp, generated tokens of tg
    batch: int

    @property
    def name(self) -> str:
        return f"{self.kind}{self.num_tokens}@b{self.batch}"

    @property
    def context(self) -> int:
        """The longest that a sequence of this test can get."""
        if self.kind == "pp":
            return self.num_tokens + 1
        return DECODE_PROMPT_TOKENS + _decode_budget(self) + 1


@dataclass(frozen=True, slots=True)
class Spread:
    """Several measurements of one thing."""

    median: float
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class SpeedResult:
    """Tokens per second, over all sequences together, and how near the machine's limit that is."""

    test: str
    tok_s: Spread
    roofline_fraction: float


def plan(prompt_tokens: int, new_tokens: int, batches: Iterable[int]) -> list[SpeedTest]:
    """The cells to measure; a count of 0 leaves its kind out.

    Raises:
        ConfigError: a count is negative, a batch is empty, or nothing is left to measure.
    """
    sizes = list(batches)
    if prompt_tokens < 0 or new_tokens < 0 or any(size < 1 for size in sizes):
        raise ConfigError("the counts of tokens must not be negative and every batch needs at least one sequence")
    tests = [SpeedTest("pp", prompt_tokens, size) for size in sizes if prompt_tokens]
    tests += [SpeedTest("tg", new_tokens, size) for size in sizes if new_tokens]
    if not tests:
        raise ConfigError("there is nothing to measure: give a count of prompt tokens, new tokens, and a batch")
    return tests


def measure(
    loaded: LoadedModel,
    tests: list[SpeedTest],
    *,
    roofline: Roofline,
    repeat: int,
    progress: Callable[[str], None] = lambda message: None,
) -> list[SpeedResult]:
    """Run every test `repeat` times after a warm-up, round by round, so that a slow minute hits all of them alike.

    Raises:
        ConfigError: `repeat` is not positive, or the model's context is too short for a test.
    """
    if repeat < 1:
        raise ConfigError(f"every test must run at least once, not {repeat} times")
    for test in tests:
        if test.context > loaded.context:
            raise ConfigError(f"{test.name} needs a context of {test.context} tokens, the model has {loaded.context}")
    most_blocks = max(test.batch * blocks_for(test.context) for test in tests)
    most_sequences = max(test.batch for test in tests)
    # The prompts of a test are the same in every round: they must be computed each time.
    generator = loaded.generator(
        num_blocks=most_blocks, max_num_seqs=max(most_sequences, 2), enable_prefix_caching=False
    )
    vocab_size = loaded.checkpoint.spec.vocab_size
    seconds: dict[str, list[float]] = {test.name: [] for test in tests}
    _seconds_of(generator, SpeedTest("tg", 4, 1), vocab_size)  # threads awake, pages of the cache touched
    for round_number in range(repeat):
        for test in tests:
            progress(f"round {round_number + 1} of {repeat}: {test.name}")
            seconds[test.name].append(_seconds_of(generator, test, vocab_size))
    cost = model_cost(loaded.checkpoint)
    return [_result(test, seconds[test.name], cost, roofline) for test in tests]


def report(loaded: LoadedModel, name: str, roofline: Roofline, results: list[SpeedResult]) -> dict[str, object]:
    """The JSON document of a run."""
    return {
        "model": name,
        "bytes": loaded.checkpoint.file_bytes,
        "threads": loaded.model.threads,
        "isa": loaded.model.isa,
        "roofline": asdict(roofline),
        "results": [asdict(result) for result in results],
        "version": __version__,
        "metrics_version": METRICS_VERSION,
    }


def _decode_budget(test: SpeedTest) -> int:
    # The first sequences generate while the prompts of the last are still read; what they generate then is not timed,
    # but they must not run out of tokens.
    prefill_steps = -(-test.batch * DECODE_PROMPT_TOKENS // (PREFILL_BESIDE_DECODE - test.batch))
    return test.num_tokens + prefill_steps + 2


def _seconds_of(generator: Generator, test: SpeedTest, vocab_size: int) -> float:
    prompt_tokens = test.num_tokens if test.kind == "pp" else DECODE_PROMPT_TOKENS
    source = random.Random(0)
    prompts = [[source.randrange(vocab_size) for _ in range(prompt_tokens)] for _ in range(test.batch)]
    max_tokens = 1 if test.kind == "pp" else _decode_budget(test)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    started: set[int] = set()
    steps = generator.generate(prompts, params)
    begin = perf_counter()
    for events in steps:
        started.update(event.index for event in events)
        if len(started) == test.batch:
            break
    if test.kind == "tg":
        begin = perf_counter()
        for _ in range(test.num_tokens):
            next(steps)
    seconds = perf_counter() - begin
    steps.close()
    return seconds


def _result(test: SpeedTest, seconds: list[float], cost: ModelCost, roofline: Roofline) -> SpeedResult:
    tokens = test.num_tokens * test.batch
    rates = [tokens / one for one in seconds]
    typical = statistics.median(seconds)
    if test.kind == "pp":
        fraction = prefill_fraction(cost, roofline, tokens=tokens, prompts=test.batch, seconds=typical)
    else:
        context = DECODE_PROMPT_TOKENS + test.num_tokens // 2  # on average over the run
        step_seconds = typical / test.num_tokens
        fraction = decode_fraction(cost, roofline, batch=test.batch, context=context, step_seconds=step_seconds)
    return SpeedResult(test.name, Spread(statistics.median(rates), min(rates), max(rates)), fraction)
