"""From the hidden states of a text to its vector."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.engine.request import Request


def pooled_state(request: Request, error: str | None) -> npt.NDArray[np.float32]:
    """The hidden state [hidden_size] of the last token, or the mean of all, of a request that has ended.

    Raises:
        RuntimeError: there is none, because the request failed or was ended, or the model gave no numbers.
    """
    if error is not None or request.pooled is None or not request.is_complete:
        raise RuntimeError(error or "the request was ended before its vector was ready")
    count = len(request.prompt_token_ids) if request.pooling == "mean" else 1
    state = (request.pooled / count).astype(np.float32)
    if not np.isfinite(state).all():
        raise RuntimeError("the hidden states of this text hold NaN or infinity")
    return state


def unit_vector(request: Request, error: str | None) -> npt.NDArray[np.float32]:
    """The pooled state scaled to length 1.

    Raises:
        RuntimeError: as pooled_state does.
    """
    state = pooled_state(request, error)
    norm = float(np.linalg.norm(state.astype(np.float64)))
    return (state / np.float64(norm)).astype(np.float32) if norm > 0 else state
