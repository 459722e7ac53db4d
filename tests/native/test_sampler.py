"""The native sampler: cuts and draws against their definitions, and draws that no neighbour can change."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from native.tiny_models import native_layer, tiny
from nybble import _native

pytestmark = pytest.mark.kernels
VOCAB = 5003


def model(vocab: int = VOCAB, threads: int = 2) -> _native.Model:
    """Sampling needs no weights."""
    llama = tiny("llama-f32")
    layers = [native_layer(llama.spec.layers[0], *llama.ropes[0])]
    return _native.Model(
        vocab_size=vocab, hidden_size=256, norm_eps=1e-5, layers=layers, tied_head=True, threads=threads
    )


def draw(native: _native.Model, logits: npt.NDArray[np.float32], **params: object) -> list[tuple]:
    defaults = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0, "top_logprobs": 0,
    }  # fmt: skip
    types = dict.fromkeys(("temperature", "top_p", "min_p"), np.float32)
    types |= dict.fromkeys(("top_k", "top_logprobs"), np.int32) | dict.fromkeys(("seed", "position"), np.uint64)
    columns = {
        name: np.broadcast_to(np.asarray(value, types[name]), len(logits)).copy()
        for name, value in (defaults | params).items()
    }
    return native.sample(logits, **columns)


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * 3).astype(np.float32)


def log_softmax(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    x = x.astype(np.float64)
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def test_greedy_takes_the_first_of_the_largest():
    logits = random_logits(4)
    logits[1, [70, 4000]] = 99
    drawn = draw(model(), logits, temperature=0.0)
    assert [token for token, _, _ in drawn] == logits.argmax(1).tolist()
    assert drawn[1][0] == 70


def test_logprobs_are_those_of_the_raw_distribution():
    logits = random_logits(3)
    for row, (token, logprob, top) in enumerate(draw(model(), logits, temperature=0.3, top_k=5, top_logprobs=7)):
        want = log_softmax(logits[row])
        assert logprob == pytest.approx(want[token], abs=1e-5)
        assert [t for t, _ in top] == np.argsort(-want)[:7].tolist()
        assert [p for _, p in top] == pytest.approx(np.sort(want)[::-1][:7], abs=1e-5)
    assert math.isnan(draw(model(), logits[:1], top_logprobs=-1)[0][1])


def test_a_draw_does_not_depend_on_its_neighbours():
    logits = random_logits(33)
    params = {"temperature": 0.8, "top_p": 0.9, "seed": np.arange(33), "position": np.arange(33) * 7}
    together = draw(model(threads=3), logits, **params)
    single = model(threads=1)
    for row in range(33):
        one = {name: value[row] if isinstance(value, np.ndarray) else value for name, value in params.items()}
        assert draw(single, logits[row : row + 1], **one)[0] == together[row]


def allowed(logits: npt.NDArray[np.float32], temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> dict[int, float]:
    """The definition: what may be drawn, with its probability."""
    p = np.exp(log_softmax(logits / temperature))
    order = np.argsort(-p, kind="stable")
    order = order[p[order] >= min_p * p.max()]
    if top_k:
        order = order[:top_k]
    share = p[order] / p[order].sum()
    if top_p < 1:
        order = order[: np.searchsorted(np.cumsum(share), top_p) + 1]
    return dict(zip(order.tolist(), (p[order] / p[order].sum()).tolist(), strict=True))


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 6},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.7, "min_p": 0.02, "top_k": 20, "top_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    vocab, count = 40, 20_000
    row = random_logits(1, vocab)[0] / 2
    logits = np.broadcast_to(row, (count, vocab)).copy()
    drawn = Counter(t for t, _, _ in draw(model(vocab), logits, seed=5, position=np.arange(count), **params))
    want = allowed(row, **params)
    assert set(drawn) <= set(want)
    for token, probability in want.items():
        sigma = math.sqrt(count * probability * (1 - probability)) + 1
        assert abs(drawn[token] - count * probability) < 5 * sigma


def test_top_p_that_needs_most_of_a_large_vocabulary():
    logits = (random_logits(1, 50_000) / 30).astype(np.float32)  # nearly flat
    rows = np.repeat(logits, 300, axis=0)
    want = set(allowed(logits[0], top_p=0.6))
    drawn = {t for t, _, _ in draw(model(50_000), rows, top_p=0.6, position=np.arange(300))}
    assert len(drawn) > 250
    assert len(drawn - want) <= 1  # the border may fall one token to either side in float


def test_masked_tokens_are_never_drawn():
    logits = np.full((200, VOCAB), -np.inf, np.float32)
    logits[:, [3, 4000]] = 1.0
    drawn = {t for t, _, _ in draw(model(), logits, top_k=50, position=np.arange(200))}
    assert drawn == {3, 4000}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_refuses_rows_that_are_no_distribution(bad, temperature):
    logits = random_logits(3)
    logits[1, 77] = bad
    with pytest.raises(ValueError, match="logit row 1"):
        draw(model(), logits, temperature=temperature)
    with pytest.raises(ValueError, match="logit row 0"):
        draw(model(), np.full((1, VOCAB), -np.inf, np.float32), temperature=temperature)


@pytest.mark.parametrize(
    "params", [{"temperature": -1}, {"temperature": np.nan}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 2}], ids=str
)
def test_refuses_parameters_out_of_range(params):
    with pytest.raises(ValueError, match=next(iter(params))):
        draw(model(), random_logits(1), **params)
