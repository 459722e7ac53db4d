from __future__ import annotations

import math

import numpy as np
import pytest

from fakes import VOCAB, FakeModel, expected_next
from nybble.core.errors import ConfigError
from nybble.evaluate.perplexity import perplexity, token_nll

pytestmark = pytest.mark.unit

HIT, MISS = math.log(math.e + VOCAB - 1) - 1, math.log(math.e + VOCAB - 1)  # the fake's logits are one-hot


def hand_scored(token_ids: list[int], ctx: int, first: int) -> list[float]:
    scores = []
    for start in range(0, len(token_ids) - ctx + 1, ctx):
        window = token_ids[start : start + ctx]
        scores += [HIT if expected_next(window[:i]) == window[i] else MISS for i in range(first, ctx)]
    return scores


def text(length: int) -> list[int]:
    """Half of its tokens are what the fake model predicts within windows of 40."""
    rng = np.random.default_rng(0)
    tokens: list[int] = []
    for position in range(length):
        window = tokens[position // 40 * 40 :]
        tokens.append(expected_next(window) if rng.random() < 0.5 else int(rng.integers(VOCAB)))
    return tokens


@pytest.mark.parametrize(("score_from", "first"), [(None, 21), (1, 1), (39, 39)])
def test_the_stated_tokens_are_scored(score_from: int | None, first: int) -> None:
    tokens = text(150)
    result = perplexity(FakeModel(), tokens, ctx=40, score_from=score_from)
    expected = hand_scored(tokens, 40, first)
    assert (result.windows, result.scored_tokens, result.score_from) == (3, len(expected), first)
    assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-6)
    assert result.std_error >= 0


def test_a_window_longer_than_a_step() -> None:
    tokens = np.random.default_rng(1).integers(VOCAB, size=300).tolist()
    result = perplexity(FakeModel(), tokens, ctx=300)
    assert result.mean_nll == pytest.approx(np.mean(hand_scored(tokens, 300, 151)), rel=1e-6)


def test_bos_replaces_the_first_token_of_each_window() -> None:
    tokens = text(80)
    replaced = [5 if i % 40 == 0 else token for i, token in enumerate(tokens)]
    assert perplexity(FakeModel(), tokens, ctx=40, bos=5) == perplexity(FakeModel(), replaced, ctx=40)


def test_count_limits_the_windows() -> None:
    assert perplexity(FakeModel(), text(120), ctx=40, count=2).windows == 2


@pytest.mark.parametrize(
    ("tokens", "options"), [(39, {}), (80, {"count": 3}), (80, {"score_from": 40}), (80, {"score_from": 0})]
)
def test_what_cannot_be_scored_is_refused(tokens: int, options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        perplexity(FakeModel(), text(tokens), ctx=40, **options)


def test_nll_of_rows() -> None:
    logits = np.random.default_rng(2).normal(size=(70, 9)).astype(np.float32)
    targets = [i % 9 for i in range(70)]
    p = np.exp(logits.astype(np.float64))
    expected = -np.log(p[np.arange(70), targets] / p.sum(-1))
    assert np.allclose(token_nll(logits, targets), expected, rtol=1e-12)
