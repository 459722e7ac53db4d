"""One draw by sorting the vocabulary: what the kernel is tested against, and what runs without a GPU.

Which tokens stay is the same however one gets there. In which order they are walked decides which one a number u falls
on, so it is fixed: by falling logit where at most 2048 stay because of top_k or top_p, by id otherwise, as in the
native sampler (model/sampler_draw.cpp).
"""

from __future__ import annotations

import math

import torch

from nybble.backends.torch.ops.sampling.columns import Columns

MOST_SORTED = 2048


def draw(logits: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [rows, vocab] -> ids int64 [rows], and whether the row was a distribution."""
    ids = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    # A NaN is the maximum of its row, so one test finds it and infinity and rows where nothing is allowed.
    good = torch.isfinite(logits.amax(dim=1))
    for index, (fine, greedy) in enumerate(zip(good.tolist(), columns.greedy.tolist(), strict=True)):
        if fine:
            ids[index] = _first_largest(logits[index]) if greedy else _draw_row(logits[index], columns, index)
    return ids, good


def _first_largest(x: torch.Tensor) -> torch.Tensor:
    return (x == x.max()).nonzero()[0, 0]


def _draw_row(x: torch.Tensor, columns: Columns, index: int) -> torch.Tensor:
    temperature = columns.temperature[index]
    top_k, top_p, min_p = int(columns.top_k[index]), columns.top_p[index], float(columns.min_p[index])
    cut_k = 0 < top_k < len(x)
    ordered, order = torch.sort(x, descending=True, stable=True)
    weights = torch.exp((ordered - ordered[0]) * (1.0 / temperature))
    kept = torch.isfinite(ordered)
    if min_p > 0:
        floor = float(ordered[0]) + float(temperature) * math.log(min_p)
        kept &= ordered >= torch.tensor(floor, dtype=torch.float32, device=x.device)
    if cut_k:
        kept[top_k:] = False
    reached = torch.cumsum(torch.where(kept, weights, 0.0), 0, dtype=torch.float64)
    if top_p < 1:
        before = reached - weights.double()
        kept &= (before < top_p.double() * reached[-1]) | (torch.arange(len(x), device=x.device) == 0)
    count = int(kept.sum())
    by_logit = top_k <= MOST_SORTED if cut_k else bool(top_p < 1) and count <= MOST_SORTED
    chosen, chosen_weights = order[:count], weights[:count]
    if not by_logit:
        chosen, back = torch.sort(chosen)
        chosen_weights = chosen_weights[back]
    walked = torch.cumsum(chosen_weights, 0, dtype=torch.float64)
    at = int((walked <= columns.u[index] * walked[-1]).sum())
    if at == count:  # rounding used up the whole sum
        at = int(chosen_weights.nonzero()[-1, 0])
    return chosen[at]
