"""Byte-pair merging of one word: the best pair of neighbours becomes one symbol, until no pair is left.

Sennrich et al. 2016 (arXiv 1508.07909); with a heap as in SentencePiece, so a long word takes n log n and not n² steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush


def merge_pairs(symbols: Sequence[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """The symbols that are left when everything has been merged.

    rank(left, right): the lowest is merged first, the leftmost of equals; None is not merged. Symbols are not empty.
    """
    parts = list(symbols)
    num = len(parts)
    before, after = list(range(-1, num - 1)), list(range(1, num + 1))
    # The size tells whether an entry still stands: symbols only grow, so a pair that has changed is longer.
    heap = [
        (value, left, len(parts[left]) + len(parts[left + 1]))
        for left in range(num - 1)
        if (value := rank(parts[left], parts[left + 1])) is not None
    ]
    heapify(heap)
    while heap:
        _, left, size = heappop(heap)
        right = after[left]
        if not parts[left] or right == num or len(parts[left]) + len(parts[right]) != size:
            continue
        merged = parts[left] = parts[left] + parts[right]
        parts[right] = ""  # gone
        beyond = after[left] = after[right]
        if beyond < num:
            before[beyond] = left
            if (value := rank(merged, parts[beyond])) is not None:
                heappush(heap, (value, left, size + len(parts[beyond])))
        previous = before[left]
        if previous >= 0 and (value := rank(parts[previous], merged)) is not None:
            heappush(heap, (value, previous, len(parts[previous]) + size))
    return [part for part in parts if part]
