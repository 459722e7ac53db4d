"""Watching prompts step by step."""

from __future__ import annotations

import pytest

from fakes import FakeModel, FakeTokenizer, continuation
from nybble.core.errors import ConfigError, PromptError
from nybble.core.sampling import SamplingParams
from nybble.engine.core import EngineCore
from nybble.engine.generate import Generator

pytestmark = pytest.mark.unit
GREEDY = SamplingParams(temperature=0.0, max_tokens=5)


def generator() -> Generator:
    return Generator(EngineCore(FakeModel(), FakeTokenizer(), context=64, vocab_size=97, num_blocks=16))


def test_each_prompt_gets_its_tokens() -> None:
    prompts = [[1, 2, 3], [4], list(range(40))]
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for events in generator().generate(prompts, GREEDY):
        for event in events:
            tokens[event.index].append(event.token_id)
    assert tokens == {index: continuation(prompt, 5) for index, prompt in enumerate(prompts)}


def test_text_ends_with_the_last_event() -> None:
    events = [event for step in generator().generate([[1, 2]], GREEDY) for event in step]
    assert "".join(event.text for event in events) == "".join(chr(0x100 + t) for t in continuation([1, 2], 5)) + "."
    assert [event.finish_reason for event in events] == [None] * 4 + ["length"]


def test_closing_gives_the_blocks_back() -> None:
    watched = generator()
    steps = watched.generate([[1, 2], [3]], GREEDY)
    next(steps)
    steps.close()
    watched.core.check_integrity()
    assert not watched.core.has_unfinished_requests
    assert watched.core.pool.num_used == 0


def test_a_later_prompt_finds_what_an_earlier_one_left() -> None:
    watched = generator()
    prompt = list(range(33))
    list(watched.generate([prompt], GREEDY))
    (first, *_) = [event for step in watched.generate([[*prompt, 5]], GREEDY) for event in step]
    assert first.num_cached_tokens == 32


def test_nothing_runs_if_one_prompt_is_refused() -> None:
    watched = generator()
    with pytest.raises(PromptError, match="empty"):
        watched.generate([[1], []], GREEDY)
    assert not watched.core.has_unfinished_requests


def test_refuses_parameters_that_do_not_go_with_the_prompts() -> None:
    with pytest.raises(ConfigError, match="2 prompts came with 1 sets"):
        generator().generate([[1], [2]], [GREEDY])
    with pytest.raises(ConfigError, match="not n > 1"):
        generator().generate([[1]], SamplingParams(n=2))
