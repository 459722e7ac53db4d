"""Perplexity of a model on a text, defined so that it can be compared with other programs' figures.

The text is tokenised once and cut into non-overlapping windows of `ctx` tokens; what is left over is not used. Each
window starts from an empty context. Tokens `score_from`, ..., ctx - 1 of a window (counted from 0) are scored: each
given all tokens of the window before it. The default, ctx // 2 + 1, scores ctx - ctx // 2 - 1 tokens per window, each
with at least half a window of context; these are the tokens that llama-perplexity scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.core.errors import ConfigError
from nybble.engine.model import Model
from nybble.engine.scheduler import blocks_for
from nybble.evaluate.windows import split_windows, window_logits

_ROWS = 32  # converted to float64 at once


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood, and what it was taken over."""

    perplexity: float
    std_error: float  # of the perplexity, from the spread of the single tokens' log-likelihoods
    mean_nll: float
    scored_tokens: int
    windows: int
    ctx: int
    score_from: int


def perplexity(
    model: Model,
    token_ids: Sequence[int],
    *,
    ctx: int = 512,
    score_from: int | None = None,
    bos: int | None = None,
    count: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Score a text. Replaces the model's cache.

    Args:
        model: a loaded model.
        token_ids: the tokens of the text.
        ctx: tokens of a window.
        score_from: the first scored token of each window; None: ctx // 2 + 1.
        bos: replaces the first token of each window.
        count: how many windows to score; None: all.
        progress: told after each window.

    Raises:
        ConfigError: the text is too short, or no token would be scored.
    """
    first = ctx // 2 + 1 if score_from is None else score_from
    if not 1 <= first < ctx:
        raise ConfigError(f"the first scored token of a window of {ctx} must be between 1 and {ctx - 1}, not {first}")
    windows = split_windows(token_ids, ctx, bos=bos, count=count)
    model.new_cache(blocks_for(ctx))
    scores = []
    for done, window in enumerate(windows, 1):
        # The last token's logits predict what lies outside the window; they are not asked for.
        for begin, logits in window_logits(model, window[:-1], first_row=first - 1):
            scores.append(token_nll(logits, window[begin + 1 : begin + 1 + len(logits)]))
        progress(done, len(windows))
    nll = np.concatenate(scores)
    mean = float(nll.mean())
    value = math.exp(mean)
    spread = float(nll.std(ddof=1)) / math.sqrt(nll.size) if nll.size > 1 else math.nan
    return Perplexity(value, value * spread, mean, nll.size, len(windows), ctx, first)


def token_nll(logits: npt.NDArray[np.float32], targets: Sequence[int]) -> npt.NDArray[np.float64]:
    """The negative log-likelihood of one target under each row of logits, in float64."""
    rows = []
    for begin in range(0, len(logits), _ROWS):
        part = logits[begin : begin + _ROWS].astype(np.float64)
        part -= part.max(axis=-1, keepdims=True)
        chosen = part[np.arange(len(part)), np.asarray(targets[begin : begin + _ROWS])]
        rows.append(np.log(np.exp(part).sum(axis=-1)) - chosen)
    return np.concatenate(rows)
