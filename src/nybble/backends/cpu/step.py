"""What goes into a model and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Step:
    """Pieces of many sequences that go through the decoder together, one after the other.

    Several sequences may share the cache blocks of a common prefix, as long as the step writes into none of them.
    """

    token_ids: npt.NDArray[np.int32]
    cu_seqlens_q: npt.NDArray[np.int32]  # where each sequence's tokens begin, and the end of the last
    context_lens: npt.NDArray[np.int32]  # tokens of each sequence that are in the cache already
    block_tables: npt.NDArray[np.int32]  # [sequences, blocks]; entries past a sequence's last token are not read
    logit_rows: npt.NDArray[np.int32]  # the tokens of the step whose logits are wanted


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How one row of logits is drawn from.

    In this order: temperature, min_p, top_k, top_p. The draw depends on `seed` and `position` and on nothing else in
    the batch.
    """

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    logprobs: int | None = 0  # how many alternatives to report; None: not even the drawn token's log-probability


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token."""

    token_id: int
    logprob: float  # under the raw logits, before temperature and cuts; NaN if it was not asked for
    top_logprobs: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, in descending order
