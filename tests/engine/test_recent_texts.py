"""Recent outputs: found again by their own tenant, and by nobody else."""

from __future__ import annotations

import pytest

from fakes import FakeModel, FakeTokenizer, continuation
from nybble.core.sampling import SamplingParams
from nybble.engine.core import EngineCore
from nybble.engine.speculation.recent_texts import RecentTexts

pytestmark = pytest.mark.unit


def test_what_followed_the_longest_match() -> None:
    recent = RecentTexts()
    recent.add("a", [1, 2, 3, 4, 5, 6, 7])
    assert recent.find("a", [9, 3, 4, 5], 10) == (3, [6, 7])
    assert recent.find("a", [1, 2, 3, 4, 5], 1) == (5, [6])
    assert recent.find("a", [4, 5], 10)[0] == 0
    assert recent.find("a", [5, 6, 7], 10)[0] == 0  # nothing followed
    recent.add("a", [9, 3, 4, 5, 8])
    assert recent.find("a", [3, 4, 5], 10) == (3, [8])  # the latest one


def test_texts_do_not_run_into_each_other() -> None:
    recent = RecentTexts()
    recent.add(None, [1, 2, 3, 4])
    recent.add(None, [5, 6, 7, 8])
    assert recent.find(None, [1, 2, 3], 10) == (3, [4])
    assert recent.find(None, [3, 4, 5], 10)[0] == 0


def test_tenants_are_kept_apart() -> None:
    recent = RecentTexts()
    recent.add("a", [1, 2, 3, 4])
    assert recent.find("b", [1, 2, 3], 10)[0] == 0
    assert recent.find(None, [1, 2, 3], 10)[0] == 0


def test_memory_is_bounded() -> None:
    recent = RecentTexts(tenant_tokens=100, all_tokens=300)
    for number in range(50):
        recent.add("one", [number * 10 + i for i in range(9)])
    assert recent.num_tokens <= 100
    assert recent.find("one", [490, 491, 492], 1) == (3, [493])
    assert recent.find("one", [0, 1, 2], 1)[0] == 0
    for number in range(50):
        recent.add(str(number), list(range(30)))
    assert recent.num_tokens <= 300
    assert recent.find("one", [490, 491, 492], 1)[0] == 0  # the tenant that wrote least lately is forgotten
    recent.add("long", list(range(1000)))
    assert recent.num_tokens <= 300
    assert recent.find("long", [996, 997, 998], 5) == (3, [999])


@pytest.mark.parametrize(("salts", "is_faster"), [(("x", "x"), True), (("x", "y"), False), ((None, "x"), False)])
def test_an_answer_that_was_given_before_takes_few_steps(salts: tuple[str | None, ...], is_faster: bool) -> None:
    def counting(history: list[int], seed: int = 0) -> int:
        return (history[-1] * 3 + 1) % 97  # never repeats itself within 48 tokens

    model = FakeModel(following=counting)
    core = EngineCore(model, FakeTokenizer(), context=256, vocab_size=97, num_blocks=64, speculate="ngram")
    steps = []
    for salt in salts:
        model.steps.clear()
        core.add_request(core.make_request("a", [5], SamplingParams(temperature=0.0, max_tokens=40), cache_salt=salt))
        tokens: list[int] = []
        while core.has_unfinished_requests:
            for output in core.step():
                tokens = output.outputs[0].token_ids
        assert tokens == continuation([5], 40, 0, counting)
        steps.append(len(model.steps))
    assert steps[0] == 40
    assert (steps[1] < 10) == is_faster
