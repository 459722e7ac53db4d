"""From requests' sampling parameters to the columns that the native sampler takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from nybble import _native
from nybble.backends.cpu.step import BadLogitsError, Sampled, SampleRow, Scored

_Number = TypeVar("_Number", bound=np.generic)
_Row = tuple[int, float, int, tuple[tuple[int, float], ...]]
_Score = Callable[[npt.NDArray[np.float32], npt.NDArray[np.int32], int], "list[_Row | None]"]


def sample(model: _native.Model, logits: npt.NDArray[np.float32], params: Sequence[SampleRow]) -> list[Sampled]:
    """One token of each row.

    Raises:
        BadLogitsError: no token can be drawn from some rows, which it names.
        ValueError: a parameter is out of range.
    """
    logprobs = [-1 if row.logprobs is None else row.logprobs for row in params]
    edits = [_edits(row) if row.has_edits else None for row in params]
    drawn = model.sample(
        np.ascontiguousarray(logits, np.float32),
        temperature=checked_array([row.temperature for row in params], np.float32, "temperature"),
        top_k=checked_array([row.top_k for row in params], np.int32, "top_k"),
        top_p=checked_array([row.top_p for row in params], np.float32, "top_p"),
        min_p=checked_array([row.min_p for row in params], np.float32, "min_p"),
        seed=checked_array([row.seed for row in params], np.uint64, "seed"),
        position=checked_array([row.position for row in params], np.uint64, "position"),
        top_logprobs=checked_array(logprobs, np.int32, "logprobs"),
        edits=edits if any(edits) else None,
    )
    return [Sampled(token_id, logprob, top, rank or None) for token_id, logprob, rank, top in _all_good(drawn)]


def score(
    native: _Score,
    rows: npt.NDArray[np.float32],
    target_ids: Sequence[int] | npt.NDArray[np.int32],
    top: int,
) -> list[Scored]:
    """What `native` (a method of the model) says of the given tokens.

    Raises:
        BadLogitsError: some rows hold NaN or infinity.
        ValueError: an id is out of range, or there is not one for each row.
    """
    scored = native(np.ascontiguousarray(rows, np.float32), checked_array(target_ids, np.int32, "target_ids"), top)
    return [Scored(logprob, rank, likeliest) for _, logprob, rank, likeliest in _all_good(scored)]


def checked_array(values: Sequence[Any] | npt.NDArray[Any], dtype: type[_Number], what: str) -> npt.NDArray[_Number]:
    """A contiguous array of exactly this type.

    Raises:
        ValueError: a number does not fit, or an array is of another type.
    """
    if isinstance(values, np.ndarray) and values.dtype != dtype:
        raise ValueError(f"{what} must be an array of {np.dtype(dtype).name}, not {values.dtype.name}")
    try:
        return np.ascontiguousarray(values, dtype)
    except OverflowError as error:
        raise ValueError(f"{what} must fit {np.dtype(dtype).name}") from error


def _edits(row: SampleRow) -> _native.LogitEdits:
    return _native.LogitEdits(
        allowed=row.allowed_mask,
        banned_ids=checked_array(row.banned_ids, np.int32, "banned_ids"),
        bias_ids=checked_array([token_id for token_id, _ in row.logit_bias], np.int32, "logit_bias"),
        bias=checked_array([bias for _, bias in row.logit_bias], np.float32, "logit_bias"),
        repetition_penalty=row.repetition_penalty,
        presence_penalty=row.presence_penalty,
        frequency_penalty=row.frequency_penalty,
        prompt_ids=row.prompt_ids,
        output_ids=row.output_ids,
    )


def _all_good(rows: list[_Row | None]) -> list[_Row]:
    good = [row for row in rows if row is not None]
    if len(good) < len(rows):
        raise BadLogitsError(tuple(i for i, row in enumerate(rows) if row is None))
    return good
