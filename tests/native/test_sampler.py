"""The native sampler: cuts and draws against their definitions, and draws that no neighbour can change."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from native.sampling_reference import ISAS, VOCAB, allowed, draw, log_softmax, model, random_logits, ranks

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 31, 33, 63, 64, 65, 127, 1023, 1025, VOCAB])
def test_greedy_takes_the_first_of_the_largest(vocab, isa):
    logits = random_logits(6, vocab)
    logits[1, [vocab // 3, vocab - 1]] = 99
    logits[2] = 5.0
    logits[3] -= 1000
    logits[4] = -np.inf
    logits[4, -1] = -3e38
    drawn = draw(model(vocab, isa=isa), logits, temperature=0.0)
    assert [token for token, _, _, _ in drawn] == logits.argmax(1).tolist()
    assert drawn[1][0] == vocab // 3
    assert {rank for _, _, rank, _ in drawn} == {1}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [40, VOCAB])
def test_logprobs_are_those_of_the_raw_distribution(vocab, isa):
    logits = random_logits(3, vocab)
    logits[1] = np.round(logits[1])  # many equals
    native = model(vocab, isa=isa)
    for row, (token, logprob, rank, top) in enumerate(draw(native, logits, temperature=3, top_logprobs=7)):
        want = log_softmax(logits[row])
        assert logprob == pytest.approx(want[token], abs=1e-5)
        assert rank == ranks(logits[row])[token]
        assert [t for t, _ in top] == np.argsort(-want, kind="stable")[:7].tolist()
        assert [p for _, p in top] == pytest.approx(np.sort(want)[::-1][:7], abs=1e-5)
    token, logprob, rank, top = draw(native, logits[:1], top_logprobs=-1)[0]
    assert math.isnan(logprob)
    assert (rank, top) == (0, ())
    assert len(draw(native, logits[:1], top_logprobs=2**31 - 1)[0][3]) == vocab


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("top", [0, 3, 200])
def test_scores_of_given_tokens(top, isa):
    logits = random_logits(70)
    logits[3] = np.round(logits[3])
    logits[5, 10:] = -np.inf
    targets = np.random.default_rng(1).integers(0, VOCAB, len(logits)).astype(np.int32)
    scored = model(isa=isa).score(logits, targets, top)
    for row, (token, logprob, rank, likeliest) in enumerate(scored):
        want = log_softmax(logits[row])
        assert token == targets[row]
        assert logprob == pytest.approx(want[token], abs=2e-5)
        assert rank == ranks(logits[row])[token]
        order = np.argsort(-logits[row], kind="stable")[:top]
        assert [t for t, _ in likeliest] == order.tolist()
        assert [p for _, p in likeliest] == pytest.approx(want[order], abs=2e-5)
    logits[2, 7] = np.nan
    assert [one is None for one in model(isa=isa).score(logits, targets, top)] == [row == 2 for row in range(70)]


def test_a_draw_does_not_depend_on_its_neighbours():
    logits = random_logits(33)
    params = {"temperature": 0.8, "top_p": 0.9, "seed": np.arange(33), "position": np.arange(33) * 7}
    together = draw(model(threads=3), logits, **params)
    single = model(threads=1)
    for row in range(33):
        one = {name: value[row] if isinstance(value, np.ndarray) else value for name, value in params.items()}
        assert draw(single, logits[row : row + 1], **one)[0] == together[row]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 6},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"min_p": 0.05, "top_p": 0.6},
        {"top_k": 39, "top_p": 0.9},
        {"temperature": 1.7, "min_p": 0.02, "top_k": 20, "top_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params, isa):
    vocab, count = 40, 20_000
    row = random_logits(1, vocab)[0] / 2
    logits = np.broadcast_to(row, (count, vocab)).copy()
    drawn = Counter(t for t, *_ in draw(model(vocab, isa=isa), logits, seed=5, position=np.arange(count), **params))
    want = allowed(row, **params)
    assert set(drawn) <= set(want)
    for token, probability in want.items():
        sigma = math.sqrt(count * probability * (1 - probability)) + 1
        assert abs(drawn[token] - count * probability) < 5 * sigma


def test_top_p_that_needs_most_of_a_large_vocabulary():
    logits = (random_logits(1, 50_000) / 30).astype(np.float32)  # nearly flat
    rows = np.repeat(logits, 300, axis=0)
    want = set(allowed(logits[0], top_p=0.6))
    drawn = {t for t, *_ in draw(model(50_000), rows, top_p=0.6, position=np.arange(300))}
    assert len(drawn) > 250
    assert len(drawn - want) <= 1  # the border may fall one token to either side in float


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 3000}, 3000),
        ({"top_k": 4999, "min_p": 1e-30}, 4999),
        ({"top_p": 0.9, "temperature": 1.5}, None),
        ({"top_k": 4500, "top_p": 0.8}, None),
        ({"top_p": 0.999, "min_p": 0.5}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("equals", [False, True])
def test_cuts_that_keep_thousands_of_tokens(params, kept, equals):
    """The border is where it should be: everything up to it is drawn, nothing beyond it."""
    row = random_logits(1)[0] / 30
    if equals:
        row = np.round(row * 8) / 8  # the border is among equals, of which the first stay
    want = allowed(row, **params)
    assert kept in (None, len(want))
    assert len(want) > 2048
    count = 10_000
    found = Counter()
    native = model()
    for begin in range(0, count, 2000):
        logits = np.repeat(row[None], 2000, axis=0)
        found.update(t for t, *_ in draw(native, logits, position=np.arange(begin, begin + 2000), **params))
    assert len(set(found) - set(want)) <= 1  # the border may fall one token to either side in float
    assert sum(token in found for token in list(want)[-200:]) > 100
    halves = [list(want)[: len(want) // 2], list(want)[len(want) // 2 :]]
    for half in halves:
        probability = sum(want[token] for token in half)
        assert abs(sum(found[token] for token in half) / count - probability) < 0.025


def test_masked_tokens_are_never_drawn():
    logits = np.full((200, VOCAB), -np.inf, np.float32)
    logits[:, [3, 4000]] = 1.0
    drawn = {t for t, *_ in draw(model(), logits, top_k=50, position=np.arange(200))}
    assert drawn == {3, 4000}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 4}], ids=str)
def test_nothing_is_drawn_from_rows_that_are_no_distribution(bad, params, isa):
    logits = random_logits(8)
    for row, where in enumerate((0, 77, 3999, VOCAB - 4, VOCAB - 1)):
        logits[row, where] = bad
    logits[6] = -np.inf
    native = model(isa=isa)
    drawn = draw(native, logits, **params)
    assert [one is None for one in drawn] == [True] * 5 + [False, True, False]
    assert drawn[5:6] + drawn[7:8] == draw(native, logits[[5, 7]], **params)  # the others can be drawn without them


@pytest.mark.parametrize(
    "params", [{"temperature": -1}, {"temperature": np.nan}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 2}], ids=str
)
def test_refuses_parameters_out_of_range(params):
    with pytest.raises(ValueError, match=next(iter(params))):
        draw(model(), random_logits(1), **params)
