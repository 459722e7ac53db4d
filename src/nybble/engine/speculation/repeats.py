"""Finds where the end of a text has stood before: a suffix automaton that grows with the text.

After Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text". A text of n tokens has at most
2 n states; a token is added in constant time on average.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Repeats:
    """The tokens of one sequence, and the longest suffix of them that occurs earlier as well."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]  # of the longest string that ends in the state
        self._end = [-1]  # where an occurrence of it ends: the last one that was looked up, or the first one
        self._last = 0  # the state of the whole text
        self._match = 0  # the state of the longest suffix that has an earlier occurrence
        self.match_length = 0

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            self._find(token)
            self._add(token)

    def continuation(self, max_tokens: int) -> Sequence[int]:
        """What followed the earlier occurrence of the longest suffix that has one; empty if there is none."""
        if self.match_length == 0:
            return ()
        begin = self._end[self._match] + 1
        return self.tokens[begin : begin + max_tokens]

    def _find(self, token: int) -> None:
        """Make the match longer by a token, or its beginning shorter until that can be done."""
        state, length = self._match, self.match_length
        if length:
            self._end[state] = len(self.tokens) - 1  # the occurrence that has just been read is the latest one
        while state >= 0 and token not in self._next[state]:
            state = self._link[state]
            length = self._length[state] if state >= 0 else 0
        self._match, self.match_length = (self._next[state][token], length + 1) if state >= 0 else (0, 0)

    def _add(self, token: int) -> None:
        new = self._new_state(self._length[self._last] + 1, {}, len(self.tokens))
        self.tokens.append(token)
        state = self._last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        self._last = new
        if state < 0:
            self._link[new] = 0
            return
        target = self._next[state][token]
        if self._length[state] + 1 == self._length[target]:
            self._link[new] = target
            return
        copy = self._new_state(self._length[state] + 1, dict(self._next[target]), self._end[target])
        self._link[copy] = self._link[target]
        while state >= 0 and self._next[state].get(token) == target:
            self._next[state][token] = copy
            state = self._link[state]
        self._link[target] = self._link[new] = copy
        if self._match == target and self.match_length <= self._length[copy]:
            self._match = copy  # the match is among the shorter strings, which have a state of their own now

    def _new_state(self, length: int, transitions: dict[int, int], end: int) -> int:
        self._next.append(transitions)
        self._link.append(-1)
        self._length.append(length)
        self._end.append(end)
        return len(self._length) - 1
