"""The engine gives every request what it gets alone, and gives every block back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeModel, FakeTokenizer, continuation, repeating_next
from nybble.backends.cpu import BadLogitsError
from nybble.core.errors import ConfigError, PromptError
from nybble.core.outputs import RequestOutput
from nybble.core.sampling import RequestOutputKind, SamplingParams
from nybble.engine.core import EngineCore

pytestmark = pytest.mark.unit


def engine(model: FakeModel | None = None, **options) -> EngineCore:
    defaults = {"context": 128, "vocab_size": 97, "num_blocks": 32, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return EngineCore(model or FakeModel(), FakeTokenizer(), **(defaults | options))


def greedy(max_tokens: int = 8, **values) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **values)


def add(core: EngineCore, request_id: str, prompt: list[int], params: SamplingParams | None = None, **values) -> None:
    core.add_request(core.make_request(request_id, prompt, params or greedy(), **values))


def run(core: EngineCore) -> dict[str, RequestOutput]:
    """Until everything has ended; the last output of each request."""
    last: dict[str, RequestOutput] = {}
    while core.has_unfinished_requests:
        for output in core.step():
            last[output.request_id] = output
        core.check_integrity()
    return last


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 97, length).tolist()


def test_one_request() -> None:
    core = engine()
    add(core, "a", [1, 2, 3])
    output = run(core)["a"]
    assert output.outputs[0].token_ids == continuation([1, 2, 3], 8)
    assert output.outputs[0].finish_reason == "length"
    assert output.finished
    assert output.metrics is not None and output.metrics.first_token_time is not None
    assert core.pool.num_free == 32


def test_decodes_first_and_prompts_in_what_is_left() -> None:
    model = FakeModel()
    core = engine(model, max_num_batched_tokens=20)
    add(core, "a", [1, 2, 3], greedy(6))
    core.step()
    add(core, "b", prompt_of(50))
    core.step()
    assert model.steps[1].cu_seqlens_q.tolist() == [0, 1, 20]
    core.step()
    assert model.steps[2].cu_seqlens_q.tolist() == [0, 1, 20]
    core.step()
    assert model.steps[3].cu_seqlens_q.tolist() == [0, 1, 13]
    assert run(core)["b"].outputs[0].token_ids == continuation(prompt_of(50), 8)


def test_a_prefix_is_computed_once() -> None:
    model = FakeModel()
    core = engine(model)
    shared = prompt_of(40)
    add(core, "a", [*shared, 1])
    first = run(core)["a"]
    add(core, "b", [*shared, 2])
    second = run(core)["b"]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert second.outputs[0].token_ids == continuation([*shared, 2], 8)
    assert core.stats().prefix_hits == 32


def test_the_last_token_of_a_cached_prompt_still_runs() -> None:
    core = engine()
    prompt = prompt_of(32)
    add(core, "a", prompt)
    run(core)
    add(core, "b", prompt)
    output = run(core)["b"]
    assert output.num_cached_tokens == 16
    assert output.outputs[0].token_ids == continuation(prompt, 8)


def test_salts_keep_prefixes_apart() -> None:
    core = engine()
    add(core, "a", prompt_of(40), cache_salt="one")
    run(core)
    add(core, "b", prompt_of(40), cache_salt="two")
    assert run(core)["b"].num_cached_tokens == 0


def test_without_prefix_caching_nothing_is_kept() -> None:
    core = engine(enable_prefix_caching=False)
    for name in "ab":
        add(core, name, prompt_of(40))
        assert run(core)[name].num_cached_tokens == 0


@pytest.mark.parametrize("length", [5, 15, 16, 17, 32, 40])
def test_samples_share_the_prompt(length: int) -> None:
    model = FakeModel(seeded=True)
    core = engine(model)
    prompt = prompt_of(length)
    add(core, "a", prompt, SamplingParams(n=3, seed=5, max_tokens=20))
    outputs = run(core)["a"].outputs
    assert [o.token_ids for o in outputs] == [continuation(prompt, 20, 5 + i) for i in range(3)]
    computed = sum(int(step.cu_seqlens_q[-1]) for step in model.steps)
    assert computed == length + 3 * 19  # the prompt once


def test_preempted_sequences_start_again_and_end_alike() -> None:
    core = engine(num_blocks=6, max_num_seqs=4)
    for index in range(4):
        add(core, str(index), prompt_of(20, index), greedy(40))
    outputs = run(core)
    assert core.stats().num_preemptions > 0
    for index in range(4):
        assert outputs[str(index)].outputs[0].token_ids == continuation(prompt_of(20, index), 40)


def test_a_lower_priority_makes_room() -> None:
    core = engine(num_blocks=4)
    add(core, "low", prompt_of(40, 1), greedy(20), priority=5)
    core.step()
    add(core, "high", prompt_of(40, 2), greedy(20), priority=0)
    finished = []
    while core.has_unfinished_requests:
        finished += [o.request_id for o in core.step() if o.finished]
    assert finished == ["high", "low"]


def test_abort_frees_the_blocks_at_once() -> None:
    core = engine()
    add(core, "a", prompt_of(40))
    add(core, "b", [1, 2])
    core.step()
    core.abort("a")
    core.abort("nobody")
    assert core.pool.num_used == 1
    (ended,) = [o for o in core.step() if o.request_id == "a"]
    assert ended.outputs[0].finish_reason == "abort"
    assert run(core)["b"].outputs[0].token_ids == continuation([1, 2], 8)


def test_an_error_in_one_request_ends_that_request_only() -> None:
    class Broken(FakeModel):
        def sample(self, logits, params):
            bad = tuple(i for i, row in enumerate(params) if row.seed == 13)
            if bad:
                raise BadLogitsError(bad)
            return super().sample(logits, params)

    core = engine(Broken())
    add(core, "bad", [1, 2, 3], SamplingParams(seed=13, max_tokens=8))
    add(core, "good", [4, 5])
    outputs = run(core)
    assert outputs["bad"].outputs[0].finish_reason == "error"
    assert "NaN" in (outputs["bad"].error or "")
    assert outputs["good"].outputs[0].token_ids == continuation([4, 5], 8)


def test_a_step_that_fails_ends_what_was_in_it() -> None:
    class Broken(FakeModel):
        def execute(self, step):
            if len(self.steps) == 2:
                self.steps.append(step)
                raise ValueError("no")
            return super().execute(step)

    core = engine(Broken())
    add(core, "a", [1, 2, 3])
    assert run(core)["a"].error == "no"
    add(core, "b", [1, 2, 3])
    assert run(core)["b"].outputs[0].token_ids == continuation([1, 2, 3], 8)


def test_ends() -> None:
    expected = continuation([3, 4], 12)
    core = engine(eos_token_ids=frozenset({expected[4]}))
    add(core, "eos", [3, 4], greedy(12))
    add(core, "ignored", [3, 4], greedy(12, ignore_eos=True))
    add(core, "token", [3, 4], greedy(12, stop_token_ids=[expected[2]]))
    letters = [chr(0x100 + t) for t in expected]
    add(core, "string", [3, 4], greedy(12, stop=letters[1] + letters[2]))
    add(core, "shown", [3, 4], greedy(12, stop=letters[1] + letters[2], include_stop_str_in_output=True))
    outputs = {name: output.outputs[0] for name, output in run(core).items()}
    assert (outputs["eos"].token_ids, outputs["eos"].finish_reason) == (expected[:5], "stop")
    assert outputs["eos"].text == "".join(letters[:4]) + "."
    assert (outputs["ignored"].token_ids, outputs["ignored"].finish_reason) == (expected, "length")
    assert (outputs["token"].token_ids, outputs["token"].stop_reason) == (expected[:3], expected[2])
    assert outputs["string"].text == letters[0]
    assert outputs["string"].stop_reason == letters[1] + letters[2]
    assert outputs["shown"].text == "".join(letters[:3])


def test_min_tokens_bans_the_ends() -> None:
    model = FakeModel()
    core = engine(model, eos_token_ids=frozenset({90}))
    add(core, "a", [3, 4], greedy(3, min_tokens=2, stop_token_ids=[91]))
    run(core)
    assert [row.banned_ids for row in model.rows] == [(90, 91), (90, 91), ()]


def test_bad_words_ban_their_last_token() -> None:
    model = FakeModel()
    core = engine(model)
    expected = continuation([3, 4], 3)
    word = chr(97 + expected[0]) + "x"  # the fake encoder takes code points modulo the vocabulary
    add(core, "a", [3, 4], greedy(3, bad_words=[word, "b"]))
    run(core)
    b, x = ord("b") % 97, ord("x") % 97
    assert [sorted(row.banned_ids) for row in model.rows] == [[b], sorted({b, x}), [b]]


def test_deltas_add_up() -> None:
    core = engine()
    add(core, "a", [1, 2, 3], greedy(8, output_kind=RequestOutputKind.DELTA, logprobs=1))
    token_ids, text, logprobs = [], "", []
    while core.has_unfinished_requests:
        for output in core.step():
            token_ids += output.outputs[0].token_ids
            text += output.outputs[0].text
            logprobs += output.outputs[0].logprobs or []
    expected = continuation([1, 2, 3], 8)
    assert token_ids == expected
    assert text == "".join(chr(0x100 + t) for t in expected) + "."
    assert [next(iter(position)) for position in logprobs] == expected
    assert logprobs[0][1].logprob == -0.25


def test_prompt_logprobs_over_chunks() -> None:
    core = engine(max_num_batched_tokens=16)
    prompt = prompt_of(40)
    for name in "ab":  # the second finds its prefix cached, and has to be scored all the same
        add(core, name, prompt, greedy(2, prompt_logprobs=1))
        scored = run(core)[name].prompt_logprobs
        assert scored is not None and scored[0] is None and len(scored) == 40
        for position in range(1, 40):
            assert scored[position][prompt[position]].logprob == -float(sum(prompt[:position]))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooling(pooling) -> None:
    core = engine(max_num_batched_tokens=16)
    prepared = core.make_request("a", prompt_of(40), greedy(), pooling=pooling)
    core.add_request(prepared)
    run(core)
    sums = np.cumsum(prompt_of(40))
    expected = sums.sum() if pooling == "mean" else sums[-1]
    assert prepared.pooled is not None
    assert prepared.pooled[0] == expected


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([], greedy(), PromptError, "empty"),
        ([97], greedy(), PromptError, "97, which is not a token id"),
        ([1] * 128, greedy(), PromptError, "leaves no room"),
        ([1], greedy(n=9), ConfigError, "at most 8 sequences"),
        ([1], greedy(logit_bias={97: 1.0}), ConfigError, "logit_bias holds 97"),
        ([1], greedy(allowed_token_ids=[-1]), ConfigError, "allowed_token_ids holds -1"),
    ],
)
def test_refuses(prompt, params, error, message) -> None:
    with pytest.raises(error, match=message):
        engine().make_request("a", prompt, params)


def test_refuses_what_can_never_fit() -> None:
    with pytest.raises(PromptError, match="need 7 cache blocks, there are 4"):
        engine(num_blocks=4).make_request("a", [1] * 50, greedy(50))


def test_refuses_an_id_twice() -> None:
    core = engine()
    add(core, "a", [1])
    with pytest.raises(ConfigError, match="already under way"):
        add(core, "a", [1])


@st.composite
def workloads(draw):
    requests = []
    for index in range(draw(st.integers(1, 8))):
        length = draw(st.integers(1, 60))
        requests.append(
            {
                "prompt": prompt_of(length, draw(st.integers(0, 2))),  # few seeds: prefixes are shared
                "params": SamplingParams(n=draw(st.integers(1, 3)), seed=index, max_tokens=draw(st.integers(1, 40))),
                "priority": draw(st.integers(0, 2)),
                "at": draw(st.integers(0, 30)),
                "cancel": draw(st.none() | st.integers(1, 30)),
            }
        )
    return requests


@settings(max_examples=150, deadline=None)
@given(
    requests=workloads(),
    num_blocks=st.integers(7, 20),
    budget=st.integers(4, 64),
    caching=st.booleans(),
    speculate=st.sampled_from(["off", "ngram", "auto"]),
)
def test_everyone_gets_what_they_get_alone(requests, num_blocks, budget, caching, speculate) -> None:
    core = engine(
        FakeModel(seeded=True, following=repeating_next),
        speculate=speculate,
        context=100,
        num_blocks=num_blocks,
        max_num_seqs=4,
        max_num_batched_tokens=budget,
        enable_prefix_caching=caching,
    )
    last: dict[str, RequestOutput] = {}
    step = 0
    while step <= 30 or core.has_unfinished_requests:
        for index, request in enumerate(requests):
            if request["at"] == step:
                add(core, str(index), request["prompt"], request["params"], priority=request["priority"])
            if request["cancel"] is not None and request["at"] + request["cancel"] == step:
                core.abort(str(index))
        for output in core.step():
            last[output.request_id] = output
        core.check_integrity()
        step += 1
        assert step < 3000
    assert len(last) == len(requests)
    for index, request in enumerate(requests):
        for sample in last[str(index)].outputs:
            expected = continuation(
                request["prompt"], request["params"].max_tokens, index + sample.index, repeating_next
            )
            if sample.finish_reason == "abort":
                assert request["cancel"] is not None
                assert sample.token_ids == expected[: len(sample.token_ids)]
            else:
                room = 100 - len(request["prompt"])
                assert sample.token_ids == expected[:room]
                assert sample.finish_reason == "length"
