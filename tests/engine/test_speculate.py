"""Guesses change how many steps a text takes, and nothing else."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from fakes import FakeModel, FakeTokenizer, continuation, expected_next, repeating_next
from nybble.core.errors import ConfigError
from nybble.core.sampling import SamplingParams
from nybble.engine.core import EngineCore
from nybble.engine.options import EngineOptions
from nybble.engine.speculation.speculator import MAX_GUESSES
from nybble.engine.speculation.step_costs import StepCosts

pytestmark = pytest.mark.unit


def period(history: list[int], seed: int = 0) -> int:
    return len(history) % 6


def engine(model: FakeModel, **options) -> EngineCore:
    defaults = {"context": 256, "vocab_size": 97, "num_blocks": 64, "max_num_seqs": 8, "speculate": "ngram"}
    return EngineCore(model, FakeTokenizer(), **(defaults | options))


def finish(core: EngineCore, prompt: list[int], **values: object) -> list[int]:
    params = SamplingParams(temperature=0.0, **values)
    core.add_request(core.make_request("a", prompt, params))
    tokens: list[int] = []
    while core.has_unfinished_requests:
        for output in core.step():
            tokens = output.outputs[0].token_ids
        core.check_integrity()
    return tokens


def test_a_text_that_repeats_takes_few_steps() -> None:
    model = FakeModel(following=period)
    core = engine(model)
    assert finish(core, [0, 1, 2, 3, 4, 5], max_tokens=100) == continuation([0, 1, 2, 3, 4, 5], 100, 0, period)
    assert len(model.steps) < 20
    stats = core.stats().speculation
    assert stats.drafted >= stats.accepted >= 80
    assert max(len(step.token_ids) for step in model.steps) <= 1 + MAX_GUESSES
    assert core.stats().kv_usage == 0


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 30])
def test_an_end_among_the_guesses(max_tokens: int) -> None:
    for stop in ([], [4]):
        for ignore in (True, False):
            values = {"max_tokens": max_tokens, "stop_token_ids": stop, "ignore_eos": ignore}
            plain = finish(engine(FakeModel(following=period), speculate="off"), [0, 1, 2, 3, 4, 5] * 3, **values)
            assert finish(engine(FakeModel(following=period)), [0, 1, 2, 3, 4, 5] * 3, **values) == plain


def test_penalties_and_bad_words_see_each_token() -> None:
    class Rows(FakeModel):
        positions: list[tuple[int, int]]

        def sample(self, logits, params):
            for row in params:
                assert row.output_ids is not None and len(row.output_ids) == row.position
            return super().sample(logits, params)

    tokens = finish(engine(Rows(following=period)), [0, 1, 2, 3, 4, 5], max_tokens=50, presence_penalty=0.5)
    assert tokens == continuation([0, 1, 2, 3, 4, 5], 50, 0, period)


def test_forced_tokens_are_taken_in_one_step() -> None:
    class Forced:
        """Leaves no choice for ten tokens, then ends."""

        def __init__(self) -> None:
            self.at = 0

        def fill_mask(self, out: npt.NDArray[np.uint32]) -> None:
            out[:] = 0
            out[(30 + self.at) // 32] |= np.uint32(1 << (30 + self.at) % 32)

        def accept(self, token_id: int) -> bool:
            assert token_id == 30 + self.at
            self.at += 1
            return True

        def is_finished(self) -> bool:
            return self.at >= 10

        def forced_tokens(self) -> list[int]:
            return [] if self.is_finished() else list(range(30 + self.at, 40))

        def likely_tokens(self, limit: int) -> list[int]:
            return []

    class Masked(FakeModel):
        def sample(self, logits, params):
            masks = [np.unpackbits(row.allowed_mask.view(np.uint8), bitorder="little")[:97] for row in params]
            return super().sample(np.where(np.array(masks) > 0, 1.0, 0.0).astype(np.float32), params)

    from nybble.core.sampling import StructuredOutputsParams

    model = Masked()
    core = engine(model, compile_grammar=lambda params: Forced())
    tokens = finish(core, [1], max_tokens=50, structured_outputs=StructuredOutputsParams(regex="x"))
    assert tokens == list(range(30, 40))
    assert len(model.steps) == 2


def test_guesses_never_preempt_anybody() -> None:
    core = engine(FakeModel(following=repeating_next), num_blocks=6, context=90)
    for name in "abc":
        core.add_request(core.make_request(name, [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=25)))
    while core.has_unfinished_requests:
        core.step()
        core.check_integrity()
    assert core.stats().num_preemptions == 0


def test_costs_between_what_is_known() -> None:
    costs = StepCosts()
    assert costs.seconds(3, 3) is None
    costs.add(1, 1, 1.0)
    assert costs.seconds(1, 1) == 1.0
    assert costs.seconds(5, 5) == 2.0  # a cautious guess
    costs.add(100, 1, 10.0)
    assert costs.seconds(11, 11) == pytest.approx(2.0)
    costs.add(9, 9, 1.4)
    assert costs.seconds(5, 5) == pytest.approx(1.2)
    for _ in range(2):
        costs.add(3, 3, 100.0)  # disturbed
        assert costs.seconds(3, 3) == pytest.approx(1.2)
    costs.add(3, 3, 100.0)
    assert costs.seconds(3, 3) == pytest.approx(1.2 * 1.3)


def test_a_row_of_logits_costs_more_than_a_token_of_a_prompt() -> None:
    costs = StepCosts(row_weight=0.5)
    costs.add(1, 1, 1.0)
    costs.add(200, 0, 20.0)
    assert costs.seconds(101, 1) == pytest.approx(1.0 + 100 * 0.1)
    assert costs.seconds(101, 101) == pytest.approx(1.0 + 100 * 0.15)
    costs.add(64, 64, 8.0)  # one that has run is known better
    assert costs.seconds(64, 64) == pytest.approx(8.0)
    per_unit = 0.1 + 0.2 * (8.0 / 96 - 0.1)
    assert costs.seconds(74, 74) == pytest.approx(8.0 + 10 * 1.5 * per_unit)


class Costs:
    """A machine that is known from the start: each token more costs a little."""

    def add(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        pass

    def seconds(self, num_tokens: int, num_rows: int) -> float:
        return 16.0 + 1.2 * num_tokens


@pytest.mark.parametrize(("num_repeating", "is_used"), [(1, False), (8, True)])
def test_one_that_repeats_does_not_keep_the_others_waiting(num_repeating: int, is_used: bool) -> None:
    def following(history: list[int], seed: int = 0) -> int:
        return period(history) if history[0] == 0 else expected_next(history)

    model = FakeModel(following=following)
    core = engine(model, speculate="auto")
    core._speculator._costs = Costs()  # type: ignore[assignment]  # only what the speculator asks of the real one
    for i in range(8):
        prompt = [0, 1, 2, 3, 4, 5] * 3 if i < num_repeating else [10 + 7 * i, 3, 50 + i]
        core.add_request(
            core.make_request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True))
        )
    for _ in range(20):
        core.step()
    longest = max(len(step.token_ids) for step in model.steps[1:])
    assert (longest > 16) if is_used else (longest == 8)


def test_guesses_do_not_keep_prompts_waiting() -> None:
    model = FakeModel(following=period)
    core = engine(model, max_num_batched_tokens=250)
    for name in "abcd":
        core.add_request(core.make_request(name, [0, 1, 2, 3, 4, 5], SamplingParams(temperature=0.0, max_tokens=99)))
    for _ in range(3):
        core.step()
    assert len(model.steps[-1].token_ids) == 4 * (1 + 6)
    core.add_request(core.make_request("long", [7] * 200, SamplingParams(temperature=0.0, max_tokens=2)))
    core.step()
    assert len(model.steps[-1].token_ids) == 4 + 200 + 10, "a twentieth"
    core.step()
    assert len(model.steps[-1].token_ids) >= 4 * (1 + 6)


def test_other_ways_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="auto, off, ngram or draft=MODEL"):
        EngineOptions(speculate="medusa")
