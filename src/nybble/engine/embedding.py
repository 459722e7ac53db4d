"""From pooled hidden states to the vector of a text."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def unit_vector(pooled: npt.NDArray[np.float32] | None, error: str | None) -> npt.NDArray[np.float32]:
    """A pooled hidden state [hidden_size] scaled to length 1.

    Raises:
        RuntimeError: there is none, because the request failed or was ended.
    """
    if pooled is None or error is not None:
        raise RuntimeError(error or "the request was ended before its vector was ready")
    norm = float(np.linalg.norm(pooled))
    return pooled / np.float32(norm) if norm > 0 else pooled
