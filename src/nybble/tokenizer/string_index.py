"""Finds strings in a vocabulary without a Python object for each of them.

A dict of 262,144 pieces takes 40 MB and, because every insertion misses the cache, longer to fill than to sort this.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from nybble.core.errors import TokenizerError

_RUN = 1 << 14


class StringIndex:
    """string -> its position in a sequence. A table of hashes finds it, the sequence itself confirms it.

    name: what the sequence is called in errors. without: positions that are not to be found. may_repeat: positions
    whose strings may stand elsewhere, too. visit: told all strings in order, in runs, so that who needs them as well
    need not have them made again.

    Raises TokenizerError if something is not a string, or stands twice.
    """

    def __init__(
        self,
        strings: Sequence[str],
        name: str,
        *,
        without: Collection[int] = (),
        may_repeat: Collection[int] = (),
        visit: Callable[[list[str]], None] | None = None,
    ) -> None:
        self._strings = strings
        parts = [np.empty(0, np.int64)]
        for run in _runs(strings):
            if set(map(type, run)) != {str}:
                raise TokenizerError(f"{name} is not a list of strings: the file is damaged")
            parts.append(np.fromiter(map(hash, run), np.int64, len(run)))
            if visit is not None:
                visit(run)
        hashes = np.concatenate(parts)
        order = np.argsort(hashes, kind="stable")
        if without:
            order = order[~np.isin(order, np.fromiter(without, np.int64, len(without)))]
        self._sorted = hashes[order]
        self._refuse_twins(order, frozenset(may_repeat), name)
        self._hashes = array("q", self._sorted.tobytes())  # bisect reads an array several times as fast as numpy's
        self._positions = array("i", order.astype(np.intc).tobytes())

    def __len__(self) -> int:
        return len(self._positions)

    def get(self, string: str) -> int | None:
        """Where the string stands; None if it does not."""
        wanted = hash(string)
        at = bisect_left(self._hashes, wanted)
        while at < len(self._hashes) and self._hashes[at] == wanted:
            if self._strings[self._positions[at]] == string:
                return self._positions[at]
            at += 1
        return None

    def missing(self, strings: Sequence[str]) -> Iterator[int]:
        """Which of many strings stand nowhere; only hashes are compared."""
        wanted = np.fromiter(map(hash, strings), np.int64, len(strings))
        at = np.searchsorted(self._sorted, wanted).clip(max=max(len(self) - 1, 0))
        found = self._sorted[at] == wanted if len(self) else np.zeros(len(wanted), np.bool_)
        return iter(np.flatnonzero(~found).tolist())

    def _refuse_twins(self, order: npt.NDArray[np.int64], may_repeat: frozenset[int], name: str) -> None:
        for i in np.flatnonzero(self._sorted[1:] == self._sorted[:-1]).tolist():
            twins = {int(order[i]), int(order[i + 1])}
            first, second = (self._strings[position] for position in twins)
            if first == second and not twins & may_repeat:
                raise TokenizerError(f"{first!r} stands twice in {name}: the file is damaged")


def _runs(strings: Sequence[str]) -> Iterator[list[str]]:
    remaining = iter(strings)
    while run := list(islice(remaining, _RUN)):
        yield run
