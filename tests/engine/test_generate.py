"""The loop over a model whose next token depends on exactly what the cache holds of the sequence."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from fakes import FakeModel, FakeTokenizer, continuation
from nybble.core.errors import ConfigError, PromptError
from nybble.core.sampling import SamplingParams
from nybble.engine.generate import Generator
from nybble.engine.sequence import KeptPrefix, Steps, TokenEvent

pytestmark = pytest.mark.unit


def collect(steps: Steps) -> dict[int, list[TokenEvent]]:
    events = defaultdict(list)
    for step in steps:
        for event in step:
            events[event.index].append(event)
    return events


def tokens(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events]


def prompts(*lengths: int) -> list[list[int]]:
    return [[(7 * i + 3 * j) % 97 for i in range(length)] for j, length in enumerate(lengths)]


@pytest.mark.parametrize("prefill_tokens", [1, 7, 16, 512])
@pytest.mark.parametrize("num_blocks", [9, 16, 200])
def test_many_sequences_get_what_each_gets_alone(prefill_tokens: int, num_blocks: int) -> None:
    asked = prompts(1, 15, 16, 17, 40, 100, 3)
    generator = Generator(FakeModel(), context=140, num_blocks=num_blocks, prefill_tokens=prefill_tokens)
    params = [SamplingParams(max_tokens=5 + i) for i in range(len(asked))]
    events = collect(generator.generate(asked, params))
    for index, prompt in enumerate(asked):
        assert tokens(events[index]) == continuation(prompt, 5 + index)
        assert [event.finish_reason for event in events[index]] == [None] * (4 + index) + ["length"]
    generator._pool.check_integrity()
    assert generator._pool.num_free == num_blocks


def test_prompts_are_read_in_chunks_beside_running_sequences() -> None:
    model = FakeModel()
    generator = Generator(model, context=100, num_blocks=50, prefill_tokens=32)
    collect(generator.generate(prompts(20, 70), SamplingParams(max_tokens=3)))
    assert [list(np.diff(step.cu_seqlens_q)) for step in model.steps] == [[20, 12], [1, 32], [1, 26], [1], [1]]
    assert [list(step.logit_rows) for step in model.steps] == [[19], [0], [0, 26], [0], [0]]


def test_the_end_token_ends_a_sequence_without_text() -> None:
    (prompt,) = prompts(5)
    eos = continuation(prompt, 3)[-1]
    generator = Generator(FakeModel(), FakeTokenizer(), context=50, eos_token_ids=frozenset({eos}))
    events = collect(generator.generate([prompt], SamplingParams(max_tokens=10)))[0]
    assert (events[-1].token_id, events[-1].finish_reason, events[-1].text) == (eos, "stop", ".")
    assert len(events) <= 3
    going_on = collect(generator.generate([prompt], SamplingParams(max_tokens=10, ignore_eos=True)))[0]
    assert len(going_on) == 10


def test_a_stop_string_ends_a_sequence() -> None:
    (prompt,) = prompts(5)
    letters = [chr(0x100 + token_id) for token_id in continuation(prompt, 6)]
    generator = Generator(FakeModel(), FakeTokenizer(), context=50)
    params = SamplingParams(max_tokens=10, stop=(letters[3] + letters[4],))
    events = collect(generator.generate([prompt], params))[0]
    assert "".join(event.text for event in events) == "".join(letters[:3])
    assert events[-1].finish_reason == "stop"


def test_the_context_ends_a_sequence() -> None:
    (prompt,) = prompts(30)
    generator = Generator(FakeModel(), context=40)
    events = collect(generator.generate([prompt], SamplingParams(max_tokens=None)))[0]
    assert tokens(events) == continuation(prompt, 10)
    assert events[-1].finish_reason == "length"


def test_log_probabilities_only_when_asked_for() -> None:
    model = FakeModel()
    generator = Generator(model, context=40)
    without, with_them = SamplingParams(max_tokens=1), SamplingParams(max_tokens=1, logprobs=1)
    events = collect(generator.generate(prompts(3, 3), [without, with_them]))
    assert (events[0][0].logprob, events[0][0].top_logprobs) == (None, ())
    assert (events[1][0].logprob, events[1][0].top_logprobs) == (-0.5, ((1, -0.25),))


def test_each_sequence_has_its_own_seed_and_position() -> None:
    model = FakeModel()
    generator = Generator(model, context=40)
    params = [SamplingParams(seed=5, max_tokens=2), SamplingParams(max_tokens=2), SamplingParams(max_tokens=2)]
    collect(generator.generate(prompts(3, 3, 3), params))
    assert [row.position for row in model.rows] == [0, 0, 0, 1, 1, 1]
    assert model.rows[0].seed == model.rows[3].seed == 5
    assert model.rows[1].seed == model.rows[4].seed != model.rows[2].seed


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "empty"), ([1] * 40, "has 40 tokens and the context holds 40"), ([1] * 30, "blocks")]
)
def test_a_prompt_that_cannot_be_served_is_refused_before_anything_runs(prompt: list[int], message: str) -> None:
    model = FakeModel()
    generator = Generator(model, context=40, num_blocks=2)
    with pytest.raises(PromptError, match=message):
        generator.generate([[1], prompt], SamplingParams(max_tokens=8))
    assert not model.steps


def test_arguments_that_do_not_fit_together() -> None:
    generator = Generator(FakeModel(), context=40)
    with pytest.raises(ConfigError, match="2 prompts came with 1"):
        generator.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(ConfigError, match="exactly one prompt"):
        generator.generate([[1], [2]], SamplingParams(), keep=KeptPrefix())


def test_stopping_early_gives_the_blocks_back() -> None:
    generator = Generator(FakeModel(), context=100, num_blocks=8)
    steps = generator.generate(prompts(20, 20, 60), SamplingParams(max_tokens=30))
    next(steps)
    steps.close()
    assert generator._pool.num_free == 8


def test_a_kept_prefix_is_not_computed_again() -> None:
    model = FakeModel()
    generator = Generator(model, context=200)
    kept = KeptPrefix()
    conversation = prompts(30)[0]
    for turn in range(4):
        model.steps.clear()
        num_cached = len(kept.token_ids)
        events = collect(generator.generate([conversation], SamplingParams(max_tokens=10), keep=kept))[0]
        assert tokens(events) == continuation(conversation, 10)
        assert sum(len(step.token_ids) for step in model.steps) == len(conversation) - num_cached + 9
        conversation = [*conversation, *tokens(events), turn, turn + 1]
        assert kept.token_ids == conversation[:-3]  # the last token of an answer has not gone through the model
        generator._pool.check_integrity()
    generator.drop(kept)
    assert generator._pool.num_free == 13


def test_a_kept_prefix_that_differs_is_used_as_far_as_it_goes() -> None:
    model = FakeModel()
    generator = Generator(model, context=100)
    kept = KeptPrefix()
    first = prompts(50)[0]
    collect(generator.generate([first], SamplingParams(max_tokens=10), keep=kept))
    model.steps.clear()
    second = [*first[:20], 1, 2, 3]
    events = collect(generator.generate([second], SamplingParams(max_tokens=4), keep=kept))[0]
    assert tokens(events) == continuation(second, 4)
    assert sum(len(step.token_ids) for step in model.steps) == 3 + 3
    same = collect(generator.generate([second], SamplingParams(max_tokens=4), keep=kept))[0]
    assert tokens(same) == tokens(events)


def test_an_answer_that_is_broken_off_keeps_what_was_computed() -> None:
    generator = Generator(FakeModel(), context=100)
    kept = KeptPrefix()
    prompt = prompts(20)[0]
    steps = generator.generate([prompt], SamplingParams(max_tokens=30), keep=kept)
    for _ in range(5):
        next(steps)
    steps.close()
    assert kept.token_ids == [*prompt, *continuation(prompt, 4)]
    generator.drop(kept)
    assert generator._pool.num_free == 7
