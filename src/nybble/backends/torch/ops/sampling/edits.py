"""What requests do to their logits before temperature and cuts: masks, bias and penalties, for all rows at once.

In the order of the native sampler (model/sampler_edits.cpp): mask, banned tokens, bias, repetition, frequency,
presence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from nybble.backends.cpu.step import SampleRow

Ids = npt.NDArray[np.int32]
_NO_IDS: Ids = np.zeros(0, np.int32)


def apply_edits(logits: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    """float32 [rows, vocab], a copy where anything is changed.

    Raises:
        ValueError: a token id, a mask or a number is out of range.
    """
    edited = [i for i, row in enumerate(rows) if row.has_edits]
    if not edited:
        return logits
    some = [rows[i] for i in edited]
    _check(some, logits.shape[1])
    index = torch.tensor(edited, device=logits.device)
    x = logits[index]
    _mask(x, some)
    _at(x, some, lambda row: np.asarray(row.banned_ids, np.int32), lambda flat, at: flat.index_fill_(0, at, -math.inf))
    _bias(x, some)
    _repetition(x, some)
    _output(x, some)
    out = logits.clone()
    out[index] = x
    return out


def _mask(x: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    masks = {i: row.allowed_mask for i, row in enumerate(rows) if row.allowed_mask is not None}
    if not masks:
        return
    words = np.stack(list(masks.values())).view(np.int32)
    bits = torch.arange(32, device=x.device, dtype=torch.int32)
    allowed = ((torch.from_numpy(words).to(x.device)[:, :, None] >> bits) & 1).flatten(1)[:, : x.shape[1]] != 0
    index = torch.tensor(list(masks), device=x.device)
    x[index] = x[index].masked_fill(~allowed, -math.inf)


def _bias(x: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    values = np.array([bias for row in rows for _, bias in row.logit_bias], np.float32)
    added = torch.from_numpy(values).to(x.device)
    _at(
        x,
        rows,
        lambda row: np.array([token for token, _ in row.logit_bias], np.int32),
        lambda flat, at: flat.index_add_(0, at, added),
    )


def _repetition(x: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    if all(row.repetition_penalty == 1.0 for row in rows):
        return
    seen = torch.zeros_like(x, dtype=torch.bool)
    for read in (_prompt_ids, _output_ids):
        _at(seen, rows, read, lambda flat, at: flat.index_fill_(0, at, True))
    penalty = _column(rows, lambda row: row.repetition_penalty, x.device)
    x.copy_(torch.where(seen, torch.where(x > 0, x / penalty, x * penalty), x))


def _output(x: torch.Tensor, rows: Sequence[SampleRow]) -> None:
    if all(row.frequency_penalty == 0.0 and row.presence_penalty == 0.0 for row in rows):
        return
    counts = torch.zeros_like(x)
    one = torch.ones(1, device=x.device)
    _at(counts, rows, _output_ids, lambda flat, at: flat.index_add_(0, at, one.expand(len(at))))
    x -= _column(rows, lambda row: row.frequency_penalty, x.device) * counts
    x -= _column(rows, lambda row: row.presence_penalty, x.device) * (counts > 0)


def _at(
    x: torch.Tensor,
    rows: Sequence[SampleRow],
    read: Callable[[SampleRow], Ids],
    work: Callable[[torch.Tensor, torch.Tensor], object],
) -> None:
    """Call `work` with x [rows * vocab] and where in it the ids of all rows are."""
    ids = [read(row) for row in rows]
    if not any(len(one) for one in ids):
        return
    flat = np.concatenate([one.astype(np.int64) + i * x.shape[1] for i, one in enumerate(ids)])
    work(x.view(-1), torch.from_numpy(flat).to(x.device))


def _prompt_ids(row: SampleRow) -> Ids:
    return _NO_IDS if row.prompt_ids is None or row.repetition_penalty == 1.0 else row.prompt_ids


def _output_ids(row: SampleRow) -> Ids:
    return _NO_IDS if row.output_ids is None else row.output_ids


def _column(rows: Sequence[SampleRow], read: Callable[[SampleRow], float], device: torch.device) -> torch.Tensor:
    return torch.tensor([[read(row)] for row in rows], dtype=torch.float32, device=device)


def _check(rows: Sequence[SampleRow], vocab: int) -> None:
    words = -(-vocab // 32)
    for row in rows:
        if row.allowed_mask is not None and row.allowed_mask.shape != (words,):
            raise ValueError(f"allowed must have {words} words, not {list(row.allowed_mask.shape)}")
        if not all(math.isfinite(value) for _, value in row.logit_bias):
            raise ValueError("bias must be finite")
        if not (math.isfinite(row.repetition_penalty) and row.repetition_penalty > 0):
            raise ValueError("repetition_penalty must be finite and above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(row, name)):
                raise ValueError(f"{name} must be finite")
        bias_ids = [token for token, _ in row.logit_bias]
        for name, ids in (
            ("banned_ids", np.asarray(row.banned_ids, np.int64)),
            ("bias_ids", np.asarray(bias_ids, np.int64)),
            ("prompt_ids", _NO_IDS if row.prompt_ids is None else row.prompt_ids),
            ("output_ids", _output_ids(row)),
        ):
            if len(ids) and not (ids.min() >= 0 and ids.max() < vocab):
                raise ValueError(f"{name} must lie between 0 and {vocab - 1}")
