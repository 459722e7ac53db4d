"""Tokens that a text can call by name: they are cut out of it before anything is merged."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence


class NamedTokens:
    """Finds the names of tokens in a text, leftmost first and the longest there.

    user_defined: always found. control: found only when asked for, because they are not text.
    """

    def __init__(self, user_defined: Mapping[str, int], control: Mapping[str, int]) -> None:
        self._user_defined = {name: token_id for name, token_id in user_defined.items() if name}
        self._control = {name: token_id for name, token_id in control.items() if name}
        self._lengths = {
            False: _lengths_by_first(self._user_defined),
            True: _lengths_by_first([*self._user_defined, *self._control]),
        }
        self._firsts = {
            with_control: re.compile("[" + "".join(map(re.escape, lengths)) + "]") if lengths else None
            for with_control, lengths in self._lengths.items()
        }

    def find(self, text: str, *, control: bool, literal: Sequence[int] = ()) -> Iterator[tuple[int, int, int]]:
        """(begin, end, token id) of each name in the text.

        literal: positions in ascending order; a name that covers one of them is not the name of a control token.
        """
        firsts, lengths = self._firsts[control], self._lengths[control]
        at = 0
        while firsts is not None and (match := firsts.search(text, at)):
            begin = match.start()
            at = begin + 1
            for length in lengths[text[begin]]:
                name = text[begin : begin + length]
                token_id = self._user_defined.get(name)
                if token_id is None and control and not _covers(begin, begin + len(name), literal):
                    token_id = self._control.get(name)
                if token_id is not None:
                    at = begin + len(name)
                    yield begin, at, token_id
                    break

    def control_begins(self, text: str) -> list[int]:
        """Where the names of control tokens begin in a text, also one inside another.

        A name that the text ends within counts, too: whoever puts texts together may have the rest follow.
        """
        firsts, lengths = self._firsts[True], self._lengths[True]
        if firsts is None:
            return []
        end = len(text.rstrip())
        tail = end - max(max(found) for found in lengths.values())
        return [
            begin
            for begin in (match.start() for match in firsts.finditer(text))
            if any(text[begin : begin + length] in self._control for length in lengths[text[begin]])
            or (tail < begin < end and any(name.startswith(text[begin:end]) for name in self._control))
        ]


def _lengths_by_first(names: Sequence[str] | Mapping[str, int]) -> dict[str, list[int]]:
    """The lengths of the names that begin with a character, the longest first."""
    lengths: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        lengths[name[0]].add(len(name))
    return {first: sorted(found, reverse=True) for first, found in lengths.items()}


def _covers(begin: int, end: int, positions: Sequence[int]) -> bool:
    index = bisect_left(positions, begin)
    return index < len(positions) and positions[index] < end
