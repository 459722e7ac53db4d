"""A hundred requests on a real small model with too little memory, many of which are given up on the way.

`bench/soak.py` does the same with two thousand, over HTTP.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from models import make_tiny
from nybble import LLM, AsyncEngine, EngineOptions, SamplingParams
from nybble.core.errors import PromptError
from nybble.core.sampling import RequestOutputKind

NUM_REQUESTS, AT_ONCE = 100, 16
CONTEXT = 96
VOCAB = 259 + 13  # see models.py
SIZES = {"max_model_len": CONTEXT, "max_num_seqs": 6, "threads": 2}


@dataclass(frozen=True)
class Asked:
    prompt: list[int]
    params: SamplingParams
    tokens: list[list[int]]  # what it gets when it is alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("soak"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> LLM:
    return LLM(folder, **SIZES, kv_cache_memory="8MiB", enable_prefix_caching=False, speculate="off")


@pytest.fixture(scope="module")
def catalogue(alone: LLM) -> list[Asked]:
    """Different requests, some with a beginning that others share, and their answers."""
    draw = random.Random(5)
    shared = [draw.randrange(256) for _ in range(40)]
    found = []
    for number in range(20):
        prompt = shared[: draw.choice([0, 0, 17, 40])] + [draw.randrange(256) for _ in range(draw.randint(1, 20))]
        params = SamplingParams(
            n=1 + number % 3 // 2,
            temperature=0 if number % 2 else 0.9,
            seed=number,
            max_tokens=draw.randint(1, 36),
            ignore_eos=True,
        )
        [output] = alone.generate([prompt], params, use_tqdm=False)
        found.append(Asked(prompt, params, [sample.token_ids for sample in output.outputs]))
    return found


def test_what_is_given_up_disturbs_nobody(folder: Path, alone: LLM, catalogue: list[Asked]) -> None:
    blocks = 2 * CONTEXT // 16 + 3  # two long sequences: the others must wait, or give way
    memory = blocks * alone._loaded.model.cache_bytes_per_block
    engine = AsyncEngine.from_model(folder, options=EngineOptions(**SIZES, kv_cache_memory=memory))
    draw = random.Random(7)
    ends = {"whole": 0, "closed": 0, "cancelled": 0, "aborted": 0, "refused": 0}

    async def one(number: int, gate: asyncio.Semaphore) -> None:
        asked = draw.choice(catalogue)
        fate = draw.choices(list(ends), [60, 15, 10, 10, 5])[0]
        patience = draw.randint(1, 20)
        async with gate:
            task = asyncio.create_task(follow(f"r{number}", asked, fate, patience))
            if fate == "cancelled":
                await asyncio.sleep(draw.random() * 0.05)
                task.cancel()
            await asyncio.gather(task, return_exceptions=fate == "cancelled")
            ends[fate] += 1

    async def follow(name: str, asked: Asked, fate: str, patience: int) -> None:
        if fate == "refused":
            with pytest.raises(PromptError):
                async for _ in engine.generate([1] * CONTEXT, asked.params, name):
                    pass
            return
        got: list[list[int]] = [[] for _ in asked.tokens]
        params = replace(asked.params, output_kind=RequestOutputKind.DELTA)
        async with aclosing(engine.generate(asked.prompt, params, name)) as outputs:
            async for output in outputs:
                for sample in output.outputs:
                    got[sample.index] += sample.token_ids
                    assert asked.tokens[sample.index][: len(got[sample.index])] == got[sample.index]
                patience -= 1
                if patience == 0 and fate == "closed":
                    break
                if patience == 0 and fate == "aborted":
                    await engine.abort(name)
        if fate == "whole":
            assert got == asked.tokens

    async def all_of_them() -> None:
        gate = asyncio.Semaphore(AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for number in range(NUM_REQUESTS):
                group.create_task(one(number, gate))
        while engine._core.has_unfinished_requests:
            await asyncio.sleep(0.01)
        stats = engine.stats()
        await engine.shutdown(drain_timeout=None)
        assert stats.num_running == stats.num_waiting == 0
        assert stats.num_preemptions > 0
        assert stats.prefix_hits > 0

    asyncio.run(all_of_them())
    assert all(ends.values()), ends
    assert not engine._streams
    engine._core.check_integrity()
    assert engine._core.pool.num_used == 0
