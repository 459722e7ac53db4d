"""A draft model changes how many steps a text takes, and nothing else."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import VOCAB, FakeModel, FakeTokenizer, continuation, expected_next
from nybble.backends.cpu import Step
from nybble.core.errors import ConfigError
from nybble.core.sampling import SamplingParams
from nybble.engine.core import EngineCore
from nybble.engine.options import EngineOptions
from nybble.engine.speculation.draft_model import DraftModel, DraftWeights
from nybble.engine.speculation.load_draft import check_same_tokens
from nybble.engine.speculation.mode import Speculation, parse_mode

pytestmark = pytest.mark.unit

ALWAYS = "draft=small,k=4,always"


def nearly(history: list[int], seed: int = 0) -> int:
    """Like the target, but wrong in two of seven places."""
    right = expected_next(history, seed)
    return (right + 1) % VOCAB if len(history) % 7 in (0, 3) else right


def pair(target: FakeModel, draft: FakeModel, *, context: int = 256, **options) -> tuple[EngineCore, DraftModel]:
    weights = DraftWeights(draft, context, VOCAB)
    defaults = {"context": 256, "vocab_size": VOCAB, "num_blocks": 64, "max_num_seqs": 8, "speculate": ALWAYS}
    core = EngineCore(target, FakeTokenizer(), draft=weights, **(defaults | options))
    drafter = core._speculator._drafter
    assert isinstance(drafter, DraftModel)
    draft.steps.clear()
    return core, drafter


def finish(core: EngineCore, drafter: DraftModel, prompts: list[list[int]], **values: object) -> list[list[int]]:
    for number, prompt in enumerate(prompts):
        params = SamplingParams(**({"temperature": 0.0, "max_tokens": 40} | values))  # type: ignore[arg-type]
        core.add_request(core.make_request(str(number), prompt, params))
    tokens: dict[str, list[int]] = {}
    while core.has_unfinished_requests:
        for output in core.step():
            tokens[output.request_id] = output.outputs[0].token_ids
        core.check_integrity()
        drafter.pool.check_integrity()
    assert drafter.pool.num_used == 0
    return [tokens[str(number)] for number in range(len(prompts))]


def test_a_perfect_draft_is_always_right() -> None:
    target, draft = FakeModel(), FakeModel()
    core, drafter = pair(target, draft)
    prompts = [[1, 2, 3], [4] * 20, [5]]
    assert finish(core, drafter, prompts) == [continuation(prompt, 40) for prompt in prompts]
    stats = core.stats().speculation
    assert stats.drafted == stats.accepted > 0
    assert len(target.steps) < 14  # four guesses and one more token in each
    assert max(len(step.context_lens) for step in draft.steps) == 3  # all of them in one step


def test_wrong_guesses_leave_no_trace() -> None:
    target, draft = FakeModel(), FakeModel(following=nearly)
    core, drafter = pair(target, draft)
    prompts = [[1, 2, 3], [4] * 20]
    assert finish(core, drafter, prompts) == [continuation(prompt, 40) for prompt in prompts]
    stats = core.stats().speculation
    assert 0 < stats.accepted < stats.drafted
    assert stats.accepted / stats.drafted > 0.4  # its cache was in step with the text: `nearly` depends on every token


def test_the_draft_reads_a_long_prompt_in_pieces_and_only_once() -> None:
    prompt = [i % 50 for i in range(150)]
    draft = FakeModel()
    core, drafter = pair(FakeModel(), draft, max_num_batched_tokens=64)
    finish(core, drafter, [prompt])
    assert sum(len(step.token_ids) for step in draft.steps) < 150 + 45
    draft.steps.clear()
    finish(core, drafter, [[*prompt, 7]])
    assert len(draft.steps[0].token_ids) < 20  # the blocks of the first text are found again


def test_a_text_beyond_the_draft_goes_on_without_it() -> None:
    core, drafter = pair(FakeModel(), FakeModel(), context=30)
    assert finish(core, drafter, [[1, 2, 3]], max_tokens=100) == [continuation([1, 2, 3], 100)]
    assert 0 < core.stats().speculation.accepted < 30


def test_a_draft_that_fails_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeModel):
        def execute(self, step: Step) -> npt.NDArray[np.float32]:
            if len(self.steps) > 12:
                raise RuntimeError("no more")
            return super().execute(step)

    core, drafter = pair(FakeModel(), Broken())
    with caplog.at_level(logging.WARNING):
        assert finish(core, drafter, [[1, 2, 3]], max_tokens=100) == [continuation([1, 2, 3], 100)]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert all("the draft model failed" in line and "no more" in line for line in said)


def test_tokens_that_the_draft_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    core = EngineCore(
        FakeModel(), None, context=64, vocab_size=VOCAB, num_blocks=8, speculate=ALWAYS,
        draft=DraftWeights(FakeModel(), 64, 50),
    )  # fmt: skip
    core.add_request(core.make_request("a", [90, 91], SamplingParams(temperature=0.0, max_tokens=20)))
    tokens: list[int] = []
    while core.has_unfinished_requests:
        for output in core.step():
            tokens = output.outputs[0].token_ids
    assert tokens == continuation([90, 91], 20)


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=60), min_size=1, max_size=6),
    num_blocks=st.integers(7, 20),
    budget=st.integers(4, 64),
    seed=st.integers(0, 9),
    right=st.booleans(),
)
def test_everyone_gets_what_they_get_alone(prompts, num_blocks, budget, seed, right) -> None:
    core, drafter = pair(
        FakeModel(seeded=True),
        FakeModel(seeded=True, following=expected_next if right else nearly),
        context=100,
        num_blocks=num_blocks,
        max_num_seqs=4,
        max_num_batched_tokens=budget,
    )
    found = finish(core, drafter, prompts, seed=seed, temperature=1.0)
    assert found == [continuation(prompt, 40, seed) for prompt in prompts]


# ---- when it is asked ----


class Clock:
    """Makes steps of the models take what a test says, by replacing what the engine learnt."""

    def __init__(self, core: EngineCore, drafter: DraftModel, *, target: float, more: float, draft: float) -> None:
        class Costs:
            def __init__(self, first: float, more: float) -> None:
                self.first, self.more = first, more

            def add(self, num_tokens: int, num_rows: int, seconds: float) -> None:
                pass

            def seconds(self, num_tokens: int, num_rows: int) -> float:
                return self.first + self.more * (num_tokens - 1)

        core._speculator._costs = Costs(target, more)  # type: ignore[assignment]
        drafter._costs = Costs(draft, draft / 100)  # type: ignore[assignment]


@pytest.mark.parametrize(("draft_seconds", "is_used"), [(0.1, True), (0.9, False)])
def test_the_draft_is_asked_only_if_it_pays(draft_seconds: float, is_used: bool) -> None:
    draft = FakeModel()
    core, drafter = pair(FakeModel(), draft, speculate="draft=small")
    Clock(core, drafter, target=1.0, more=0.02, draft=draft_seconds)
    assert finish(core, drafter, [[1, 2, 3]], max_tokens=60) == [continuation([1, 2, 3], 60)]
    assert bool(draft.steps) == is_used


def test_a_draft_that_is_never_right_is_given_up_soon() -> None:
    draft = FakeModel(following=lambda history, seed: (expected_next(history, seed) + 1) % VOCAB)
    core, drafter = pair(FakeModel(), draft, speculate="draft=small")
    Clock(core, drafter, target=1.0, more=0.02, draft=0.2)
    assert finish(core, drafter, [[1, 2, 3]], max_tokens=200) == [continuation([1, 2, 3], 200)]
    assert 0 < len(draft.steps) < 30


def test_a_long_prompt_is_not_read_again_for_a_short_answer() -> None:
    for max_tokens, is_used in ((5, False), (60, True)):
        draft = FakeModel()
        core, drafter = pair(FakeModel(), draft, speculate="draft=small")
        Clock(core, drafter, target=1.0, more=0.02, draft=0.1)
        drafter.reading_seconds = lambda num_tokens: num_tokens * 0.1  # type: ignore[method-assign]
        finish(core, drafter, [[i % 50 for i in range(150)]], max_tokens=max_tokens)
        assert bool(draft.steps) == is_used


# ---- what is refused ----


def test_modes() -> None:
    assert parse_mode("auto") == Speculation("auto")
    assert parse_mode("ngram") == Speculation("always")
    assert parse_mode("draft=a,b.gguf,k=3") == Speculation("auto", "a,b.gguf", None, 3)
    assert parse_mode("draft=self:q2_k,always") == Speculation("always", None, "q2_k")
    for text, words in (
        ("draft", "auto, off, ngram or draft=MODEL"),
        ("draft=", "names no draft model"),
        ("draft=self:", "names no draft model"),
        ("draft=x,k=0", "between 1 and 16"),
        ("draft=x,k=many", "between 1 and 16"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse_mode(text)
    with pytest.raises(ConfigError, match="give both, or neither"):
        EngineOptions(speculate="draft=x")


@dataclasses.dataclass
class Words:
    """A tokenizer as far as it is compared."""

    words: list[bytes]

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def token_bytes(self, token_id: int) -> bytes:
        return self.words[token_id]


def test_another_tokenizer_is_refused() -> None:
    own = Words([b"a", b"b", b"c"])

    def check(*words: bytes) -> None:
        check_same_tokens(Words(list(words)), own, "small", "large")  # type: ignore[arg-type]

    check(b"a", b"b", b"c", b"padding")
    with pytest.raises(ConfigError, match="small has another tokenizer than large: token 1 is 'x' and not 'b'"):
        check(b"a", b"x", b"c")
    with pytest.raises(ConfigError, match="a vocabulary of 2000 tokens and large one of 3"):
        check(*[b"a"] * 2000)
