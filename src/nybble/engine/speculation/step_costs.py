"""What a step with so many tokens takes on this machine, learnt from the steps that ran."""

from __future__ import annotations

from bisect import bisect_left, insort

_SMOOTHING = 0.2
_PREFILL = 48  # tokens from which a step is bound by arithmetic
_LONGEST = 256  # tokens of a step that is remembered by itself: as many as sequences run at once, and some guesses
_GUESS = 0.25  # of a step with one token: each token more, as long as no prompt was read
_NOISE = 1.3  # a step that is dearer than the bound by this factor was disturbed
_SURE = 3  # steps that make a length dearer than the bound: after one that was disturbed it might never run again


class StepCosts:
    """Seconds of a step by its number of tokens. Between two known numbers the cost is taken for a straight line.

    row_weight: the arithmetic of a row of logits in that of a token. Where arithmetic binds, the tokens of a prompt,
    which need no row, are cheaper than guesses, which all need one.
    """

    def __init__(self, row_weight: float = 0.0) -> None:
        self._row_weight = row_weight
        self._seconds: dict[int, float] = {}
        self._known: list[int] = []  # its keys, in order
        self._times: dict[int, int] = {}  # how many steps there were
        self._per_unit: float | None = None  # of arithmetic, in a step that is bound by it

    def add(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        """A step that ran, with rows of logits for so many of its tokens."""
        if num_tokens >= _PREFILL:
            self._per_unit = _smooth(self._per_unit, seconds / self._units(num_tokens, num_rows))
        if num_tokens < _PREFILL or num_tokens == num_rows <= _LONGEST:
            if num_tokens not in self._seconds:
                insort(self._known, num_tokens)
            self._seconds[num_tokens] = _smooth(self._seconds.get(num_tokens), seconds)
            self._times[num_tokens] = self._times.get(num_tokens, 0) + 1

    def seconds(self, num_tokens: int, num_rows: int) -> float | None:
        """None as long as no step with as many or fewer tokens has run."""
        known = self._seconds.get(num_tokens)
        place = bisect_left(self._known, num_tokens)
        if place == 0:
            return known
        below = self._known[place - 1]
        low = self._seconds[below]
        # Each token more costs at most what it costs where nothing but arithmetic counts.
        if self._per_unit is None:
            bound = low + (num_tokens - below) * low * _GUESS
        else:
            more = self._units(num_tokens, num_rows) - self._units(below, min(below, num_rows))
            bound = low + more * self._per_unit
        if known is not None:
            return min(known, bound * _NOISE if self._times[num_tokens] >= _SURE else bound)
        if place == len(self._known):
            return bound
        above = self._known[place]
        high = max(self._seconds[above], low)
        return min(low + (high - low) * (num_tokens - below) / (above - below), bound)

    def _units(self, num_tokens: int, num_rows: int) -> float:
        return num_tokens + self._row_weight * num_rows


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else before + _SMOOTHING * (now - before)
