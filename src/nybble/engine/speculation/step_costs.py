"""What a step with so many tokens takes on this machine, learnt from the steps that ran."""

from __future__ import annotations

_SMOOTHING = 0.2
_PREFILL = 48  # tokens from which a step is bound by arithmetic
_GUESS = 0.25  # of a step with one token: each token more, as long as no prompt was read
_NOISE = 1.3  # a measured step that is dearer than the bound by this factor was disturbed


class StepCosts:
    """Seconds of a step by its number of tokens. Between two known numbers the cost is taken for a straight line."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._per_token: float | None = None  # in a step that is bound by arithmetic

    def add(self, num_tokens: int, seconds: float) -> None:
        """A step that ran."""
        if num_tokens >= _PREFILL:
            self._per_token = _smooth(self._per_token, seconds / num_tokens)
        else:
            self._seconds[num_tokens] = _smooth(self._seconds.get(num_tokens), seconds)

    def seconds(self, num_tokens: int) -> float | None:
        """None as long as no step with as many or fewer tokens has run."""
        below = max((n for n in self._seconds if n < num_tokens), default=None)
        known = self._seconds.get(num_tokens)
        if below is None:
            return known
        low = self._seconds[below]
        # Each token more costs at most what it costs where nothing but arithmetic counts.
        bound = low + (num_tokens - below) * (low * _GUESS if self._per_token is None else self._per_token)
        if known is not None:
            return min(known, bound * _NOISE)
        above = min((n for n in self._seconds if n > num_tokens), default=None)
        if above is None:
            return bound
        high = max(self._seconds[above], low)
        return min(low + (high - low) * (num_tokens - below) / (above - below), bound)


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else before + _SMOOTHING * (now - before)
