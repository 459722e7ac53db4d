"""What goes into a model and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt


class StepAdapter(Protocol):
    """An adapter in the form of the backend whose steps name it."""

    @property
    def memory_bytes(self) -> int: ...


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
    hidden_rows: npt.NDArray[np.int32] | None = None  # the tokens whose final-normed hidden states are wanted
    adapters: tuple[StepAdapter, ...] = ()  # that its sequences use
    adapter_of: npt.NDArray[np.int32] | None = None  # for each sequence which of them, -1: none; None: nobody has one


@dataclass(frozen=True, slots=True)
class SampleRow:
    """How one row of logits is drawn from.

    In this order: allowed_mask and banned_ids, logit_bias, the penalties, temperature, min_p, top_k, top_p. The draw
    depends on `seed` and `position` and on nothing else in the batch.
    """

    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    logprobs: int | None = 0  # how many alternatives to report; None: not even the drawn token's log-probability
    allowed_mask: npt.NDArray[np.uint32] | None = None  # [ceil(vocab / 32)]; bit i % 32 of word i / 32 allows token i
    banned_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()  # token ids and what is added to their logits
    repetition_penalty: float = 1.0  # over the prompt and the output
    presence_penalty: float = 0.0  # over the output
    frequency_penalty: float = 0.0  # over the output
    prompt_ids: npt.NDArray[np.int32] | None = None  # what the penalties count; None: nothing
    output_ids: npt.NDArray[np.int32] | None = None

    @property
    def has_edits(self) -> bool:
        """Whether the logits are changed before temperature and cuts."""
        return (
            self.allowed_mask is not None
            or bool(self.banned_ids)
            or bool(self.logit_bias)
            or self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token."""

    token_id: int
    logprob: float  # under the raw logits, before edits, temperature and cuts; NaN if it was not asked for
    top_logprobs: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, in descending order
    rank: int | None = None  # 1: the likeliest under the raw logits; None if no log-probability was asked for


class Scored(NamedTuple):
    """What the model thinks of a token that was given."""

    logprob: float
    rank: int  # 1: the likeliest; of equals, the one with the lower id comes first
    top_logprobs: tuple[tuple[int, float], ...]  # the likeliest tokens, in descending order


class BadLogitsError(ValueError):
    """No token can be drawn from some rows. The other rows may be sampled again without them."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        super().__init__(
            f"no token can be drawn from logit row {listed}: it holds NaN or infinity, or every token is forbidden"
        )
        self.rows = rows
