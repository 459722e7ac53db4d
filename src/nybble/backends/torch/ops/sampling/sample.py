"""One token for each row of logits; only the tokens, and what was asked about them, leave the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nybble.backends.cpu.sampling import checked_array
from nybble.backends.cpu.step import BadLogitsError, Sampled, SampleRow, Scored
from nybble.backends.torch.ops.choice import kernels, runs_kernels
from nybble.backends.torch.ops.sampling import reference
from nybble.backends.torch.ops.sampling.columns import make_columns
from nybble.backends.torch.ops.sampling.edits import apply_edits

_Report = tuple[float, int, tuple[tuple[int, float], ...]]


def sample(logits: torch.Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
    """Draw one token from each row of logits [rows, vocab], as CpuModel.sample does.

    The same seed and position give the same token as on the CPU, except where a rounded sum of the two falls on
    different sides of the number drawn.

    Raises:
        BadLogitsError: no token can be drawn from some rows, which it names.
        ValueError: a parameter is out of range, or there is not one for each row.
    """
    if logits.dim() != 2 or len(rows) != len(logits):
        raise ValueError("every sampling parameter needs one value for each row of logits")
    if not rows:
        return []
    raw = logits.float()
    columns = make_columns(rows, raw.device)
    edited = apply_edits(raw, rows)
    drawing = kernels.draw if runs_kernels(raw) else reference.draw
    ids, good = drawing(edited, columns)
    reported = [i for i, row in enumerate(rows) if row.logprobs is not None]
    if reported and edited is not raw:
        good = good & (torch.isfinite(raw.amax(1)) | torch.tensor([row.logprobs is None for row in rows]).to(good))
    _raise_for_bad(good)
    tops = [rows[i].logprobs or 0 for i in reported]
    if len(reported) == len(rows):
        facts = report(raw, ids, tops)
    else:
        index = torch.tensor(reported, dtype=torch.int64, device=raw.device)
        facts = report(raw[index], ids[index], tops)
    found = dict(zip(reported, facts, strict=True))
    unasked: _Report = (float("nan"), 0, ())
    out = []
    for i, token_id in enumerate(ids.tolist()):
        logprob, rank, top = found.get(i, unasked)
        out.append(Sampled(token_id, logprob, top, rank or None))
    return out


def score(logits: torch.Tensor, target_ids: Sequence[int], top: int = 0) -> list[Scored]:
    """What the model thinks of target_ids[i] where it gives logits[i], as CpuModel.score does.

    Raises:
        BadLogitsError: some rows hold NaN or infinity.
        ValueError: an id is out of range, or there is not one for each row.
    """
    ids = checked_array(target_ids, np.int32, "target_ids")
    if logits.dim() != 2 or len(ids) != len(logits):
        raise ValueError("target_ids must have one id for each row")
    if top < 0:
        raise ValueError("top must not be negative")
    if len(ids) and not (ids.min() >= 0 and ids.max() < logits.shape[1]):
        raise ValueError(f"target_ids must lie between 0 and {logits.shape[1] - 1}")
    raw = logits.float()
    if not len(ids):
        return []
    _raise_for_bad(torch.isfinite(raw.amax(1)))
    targets = torch.from_numpy(ids.astype(np.int64)).to(raw.device)
    return [Scored(*one) for one in report(raw, targets, [top] * len(ids))]


def report(raw: torch.Tensor, ids: torch.Tensor, tops: Sequence[int]) -> list[_Report]:
    """Log-probability and rank of each row's token, and the `tops[i]` likeliest ones, under the raw logits.

    Of equal logits, the one with the lower id comes first.
    """
    if not len(raw):
        return []
    # Rows of several thousand are scored at once; float64 copies of all of them would not fit.
    largest = raw.amax(1)
    norm = largest.double() + torch.log(torch.exp(raw - largest[:, None]).sum(1, dtype=torch.float64))
    value = raw.gather(1, ids[:, None])
    before = (raw > value).sum(1)
    before += ((raw == value) & (torch.arange(raw.shape[1], device=raw.device) < ids[:, None])).sum(1)
    logprobs, ranks = (value[:, 0].double() - norm).float().tolist(), (before + 1).tolist()
    most = min(max(tops), raw.shape[1])
    if most == 0:
        return [(logprob, rank, ()) for logprob, rank in zip(logprobs, ranks, strict=True)]
    likeliest = _largest(raw, most)
    values = (raw.gather(1, likeliest).double() - norm[:, None]).float().tolist()
    named = [
        tuple(zip(a[:top], b[:top], strict=True)) for a, b, top in zip(likeliest.tolist(), values, tops, strict=True)
    ]
    return list(zip(logprobs, ranks, named, strict=True))


def _largest(raw: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the `count` largest logits of each row, in order. topk alone does not say which of equals it takes."""
    bits = (raw + 0.0).view(torch.int32)  # -0 equals 0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(raw.shape[1], device=raw.device)
    keys = (ascending << 32) | (raw.shape[1] - 1 - ids)
    found: torch.Tensor = torch.topk(keys, count, dim=1).indices
    return found


def _raise_for_bad(good: torch.Tensor) -> None:
    flags = good.tolist()
    if not all(flags):
        raise BadLogitsError(tuple(i for i, fine in enumerate(flags) if not fine))
