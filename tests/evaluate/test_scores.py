"""Every figure of an evaluation against plain numpy on small random logits."""

from __future__ import annotations

import numpy as np
import pytest

from nybble.evaluate.bootstrap import Bootstrap, cut_blocks
from nybble.evaluate.divergence import divergence
from nybble.evaluate.scores import join, loss, quality, score_rows

pytestmark = pytest.mark.unit
ROWS, VOCAB = 80, 7


def random_logits(seed: int) -> np.ndarray:
    return (3 * np.random.default_rng(seed).normal(size=(ROWS, VOCAB))).astype(np.float32)


def probabilities(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64))
    return np.asarray(p / p.sum(axis=1, keepdims=True))


TARGETS = np.random.default_rng(9).integers(VOCAB, size=ROWS)
REFERENCE, MODEL = random_logits(1), random_logits(1) + random_logits(2) / 4


def test_every_figure() -> None:
    bootstrap = Bootstrap(cut_blocks(4, ROWS // 4))
    reference, model = score_rows(REFERENCE, TARGETS), score_rows(MODEL, TARGETS, REFERENCE)
    p, q, rows = probabilities(REFERENCE), probabilities(MODEL), np.arange(ROWS)
    kl = (p * np.log(p / q)).sum(axis=1)
    was, now = p.argmax(1) == TARGETS, q.argmax(1) == TARGETS
    assert 0 < was.mean() < 1 and (was & ~now).any() and (~was & now).any()

    alone, compared = quality(model, bootstrap), loss(model, reference, bootstrap)
    ppl, reference_ppl = (np.exp(-np.log(x[rows, TARGETS]).mean()) for x in (q, p))
    expected = {
        alone.perplexity: ppl,
        alone.accuracy: now.mean(),
        compared.mean_kl: kl.mean(),
        compared.median_kl: np.median(kl),
        compared.p99_kl: np.quantile(kl, 0.99),
        compared.top1_agreement: (p.argmax(1) == q.argmax(1)).mean(),
        compared.right_to_wrong: (was & ~now).mean(),
        compared.wrong_to_right: (~was & now).mean(),
        compared.flips: (was != now).mean(),
        compared.perplexity_ratio: ppl / reference_ppl,
    }
    for estimate, value in expected.items():
        assert estimate.value == pytest.approx(value, rel=1e-10)
        assert estimate.low <= estimate.value <= estimate.high
    assert compared.mean_kl.value == pytest.approx(divergence(REFERENCE, MODEL).mean_kl, rel=1e-12)


def test_a_model_beside_itself() -> None:
    bootstrap = Bootstrap(cut_blocks(4, ROWS // 4))
    found = loss(score_rows(REFERENCE, TARGETS, REFERENCE), score_rows(REFERENCE, TARGETS), bootstrap)
    assert (found.mean_kl.high, found.p99_kl.value, found.flips.high) == (0.0, 0.0, 0.0)
    assert (found.top1_agreement.low, found.perplexity_ratio.value) == (1.0, 1.0)


def test_pieces_give_what_the_whole_gives() -> None:
    whole = score_rows(MODEL, TARGETS, REFERENCE)
    pieces = join([score_rows(MODEL[i : i + 9], TARGETS[i : i + 9], REFERENCE[i : i + 9]) for i in range(0, ROWS, 9)])
    for a, b in ((whole.nll, pieces.nll), (whole.kl, pieces.kl)):
        assert a is not None and b is not None
        assert np.allclose(a, b, rtol=1e-13)
    assert (whole.right == pieces.right).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = MODEL.copy()
    logits[40, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        score_rows(logits, TARGETS)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        score_rows(MODEL, TARGETS, REFERENCE[:, :5])
