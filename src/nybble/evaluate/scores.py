"""What is kept of each scored token, and the figures that follow from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.evaluate.bootstrap import Bootstrap, Estimate, Floats

_ROWS = 32  # converted to float64 at once

Logits = npt.NDArray[np.floating]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One entry per scored token. kl and same_top are there if there was a reference."""

    nll: Floats  # negative log-likelihood of the token that follows, in nats
    right: Bools  # the likeliest token is the one that follows
    kl: Floats | None = None  # KL(reference || model) in nats
    same_top: Bools | None = None  # the likeliest token is the reference's


@dataclass(frozen=True, slots=True)
class Quality:
    """A model's predictions, by themselves."""

    perplexity: Estimate
    accuracy: Estimate  # share of tokens that were the likeliest


@dataclass(frozen=True, slots=True)
class Loss:
    """A model's predictions beside the reference's; shares are of the scored tokens."""

    mean_kl: Estimate
    median_kl: Estimate
    p99_kl: Estimate
    top1_agreement: Estimate
    flips: Estimate  # right before and wrong now, or wrong before and right now
    right_to_wrong: Estimate
    wrong_to_right: Estimate
    perplexity_ratio: Estimate  # to the reference's, from the same resamples


def score_rows(logits: Logits, targets: npt.NDArray[np.int64], reference: Logits | None = None) -> TokenScores:
    """Score rows of logits [rows, vocab] in float64, from whole rows: no token is left out of a sum.

    Raises:
        ValueError: a logit is not finite, or the reference's rows have another shape.
    """
    if reference is not None and reference.shape != logits.shape:
        raise ValueError(f"logits of shapes {reference.shape} and {logits.shape} cannot be compared row by row")
    parts = [
        _score(
            logits[at : at + _ROWS], targets[at : at + _ROWS], None if reference is None else reference[at : at + _ROWS]
        )
        for at in range(0, len(logits), _ROWS)
    ]
    return join(parts)


def join(parts: list[TokenScores]) -> TokenScores:
    """The scores of pieces, as one."""
    kl = [part.kl for part in parts if part.kl is not None]
    same = [part.same_top for part in parts if part.same_top is not None]
    return TokenScores(
        np.concatenate([part.nll for part in parts]),
        np.concatenate([part.right for part in parts]),
        np.concatenate(kl) if kl else None,
        np.concatenate(same) if same else None,
    )


def _score(logits: Logits, targets: npt.NDArray[np.int64], reference: Logits | None) -> TokenScores:
    log_q, _ = _log_softmax(logits)
    top = logits.argmax(axis=-1)
    nll = -log_q[np.arange(len(targets)), targets]
    if reference is None:
        return TokenScores(nll, top == targets)
    log_p, p = _log_softmax(reference)
    np.subtract(log_p, log_q, out=log_q)
    # Tiny negative sums are rounding and stay: they average out.
    return TokenScores(nll, top == targets, np.einsum("rv,rv->r", p, log_q), top == reference.argmax(axis=-1))


def _log_softmax(logits: Logits) -> tuple[Floats, Floats]:
    """Log-probabilities and probabilities; one exponential per logit, which is what all this costs."""
    x = logits.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("a logit is not finite")
    x -= x.max(axis=-1, keepdims=True)
    p = np.exp(x)
    total = p.sum(axis=-1, keepdims=True)
    p /= total
    x -= np.log(total)
    return x, p


def quality(scores: TokenScores, bootstrap: Bootstrap) -> Quality:
    return Quality(bootstrap.mean(scores.nll).map(math.exp), bootstrap.mean(scores.right.astype(np.float64)))


def loss(scores: TokenScores, reference: TokenScores, bootstrap: Bootstrap) -> Loss:
    """Figures of a model that was scored against this reference.

    Raises:
        ValueError: it was scored without one.
    """
    if scores.kl is None or scores.same_top is None:
        raise ValueError("the model was scored without a reference")
    lost, won = reference.right & ~scores.right, ~reference.right & scores.right

    def share(of: Bools) -> Estimate:
        return bootstrap.mean(of.astype(np.float64))

    return Loss(
        mean_kl=bootstrap.mean(scores.kl),
        median_kl=bootstrap.quantile(scores.kl, 0.5),
        p99_kl=bootstrap.quantile(scores.kl, 0.99),
        top1_agreement=share(scores.same_top),
        flips=share(lost | won),
        right_to_wrong=share(lost),
        wrong_to_right=share(won),
        perplexity_ratio=bootstrap.mean(scores.nll - reference.nll).map(math.exp),
    )
