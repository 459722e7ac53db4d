"""Running a model over text that is cut into windows, one window at a time, each from an empty context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from nybble.backends.cpu import Step
from nybble.core.errors import ConfigError
from nybble.engine.model import Model
from nybble.engine.scheduler import blocks_for

STEP_TOKENS = 128  # bounds the logits that are held at once: 128 rows of a large vocabulary are 130 MB


def split_windows(
    token_ids: Sequence[int], ctx: int, *, bos: int | None = None, count: int | None = None
) -> list[list[int]]:
    """Non-overlapping windows of `ctx` tokens; a shorter rest is left out.

    With `bos`, the first token of each window is replaced by it, so that the windows stay the same text for models
    with and without one.

    Raises:
        ConfigError: there are not enough tokens for one window, or for `count`.
    """
    if ctx < 2:
        raise ConfigError(f"a window needs at least two tokens, not {ctx}")
    found = len(token_ids) // ctx
    if found < (count or 1):
        raise ConfigError(f"{len(token_ids)} tokens make {found} windows of {ctx}, {count or 1} are needed")
    windows = [list(token_ids[start : start + ctx]) for start in range(0, found * ctx, ctx)][:count]
    if bos is not None:
        for window in windows:
            window[0] = bos
    return windows


def window_logits(
    model: Model, window: Sequence[int], *, first_row: int = 0, step_tokens: int = STEP_TOKENS
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """The logits after each token from `first_row` on, in pieces: where a piece begins, and its rows.

    The model's cache must be there already and hold the window; what was in it is overwritten.
    """
    blocks = np.arange(blocks_for(len(window)), dtype=np.int32)[None, :]
    for begin in range(0, len(window), step_tokens):
        piece = np.asarray(window[begin : begin + step_tokens], np.int32)
        skipped = min(max(first_row - begin, 0), len(piece))
        logits = model.execute(
            Step(
                token_ids=piece,
                cu_seqlens_q=np.array([0, len(piece)], np.int32),
                context_lens=np.array([begin], np.int32),
                block_tables=blocks,
                logit_rows=np.arange(skipped, len(piece), dtype=np.int32),
            )
        )
        if skipped < len(piece):
            yield begin + skipped, logits
