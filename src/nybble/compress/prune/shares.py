"""How many units of each layer stay. Knows nothing about models or files."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def whole(size: int, share: float | None, multiple: int = 1) -> int:
    """So many of `size` that stay, a multiple of `multiple` where `size` has room for one, at least one."""
    if share is None or share >= 1:
        return size
    multiple = min(multiple, size)
    return min(size, max(1, round(size * share / multiple)) * multiple)


def allocate(scores: Sequence[torch.Tensor], share: float | None, multiple: int) -> list[int]:
    """Widths of layers that may differ, together about `share` of all units.

    scores: of the units of each layer. They are compared by how many standard deviations they lie above the mean of
    their own layer (FLAP's way, arXiv 2312.11983): outputs of layers differ in size, which says nothing about what they
    are worth.
    """
    sizes = [len(score) for score in scores]
    if share is None or share >= 1:
        return sizes
    standard = [(score - score.mean()) / score.std().clamp(min=1e-12) for score in (s.double() for s in scores)]
    ranked = [one.sort(descending=True).values for one in standard]
    steps = [min(multiple, size) for size in sizes]
    widths = list(steps)
    wanted = sum(whole(size, share, multiple) for size in sizes)
    # One multiple more where its best unit is worth most, until all are given away.
    while sum(widths) < wanted:
        open_layers = [i for i, size in enumerate(sizes) if widths[i] < size]
        if not open_layers:
            break
        best = max(open_layers, key=lambda i: float(ranked[i][widths[i] : widths[i] + steps[i]].mean()))
        widths[best] = min(sizes[best], widths[best] + steps[best])
    return widths
