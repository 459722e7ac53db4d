"""How much may wait: bounded in requests and in tokens, with an honest guess of when to come back."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nybble.serve.errors import ApiError
from nybble.serve.settings import ServeSettings

_REMEMBERED = 32  # ends of requests that the guess is made from
_LONGEST_WAIT = 3600  # seconds


class Admission:
    """Counts what is under way. Belongs to one event loop."""

    def __init__(self, settings: ServeSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self.num_requests = 0
        self.num_tokens = 0
        self.num_refused = 0
        self.is_open = True  # False while the server drains
        # Ends of requests, on a clock that stands still while there are none: idle time says nothing about speed.
        self._ends: deque[float] = deque([0.0], maxlen=_REMEMBERED + 1)
        self._busy = 0.0
        self._busy_since = 0.0

    @contextmanager
    def admit(self, cost: int) -> Iterator[None]:
        """Let a request in that may take so many tokens.

        Raises:
            ApiError: 429 with Retry-After if too much waits, 503 while the server shuts down.
        """
        if not self.is_open:
            seconds = math.ceil(self._settings.drain_timeout)
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": str(max(seconds, 1))})
        excess = self.num_tokens + cost - self._settings.max_queue_tokens
        is_full = self.num_requests >= self._settings.max_queue
        if is_full or (self.num_requests > 0 and excess > 0):
            self.num_refused += 1
            seconds = self.seconds_left(max(excess, 0))
            raise ApiError(
                429,
                f"{self.num_requests} requests of up to {self.num_tokens} tokens are under way: "
                f"try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )
        if self.num_requests == 0:
            self._busy_since = self._clock()
        self.num_requests += 1
        self.num_tokens += cost
        try:
            yield
        finally:
            self._ends.append(self._busy_time())
            self.num_requests -= 1
            self.num_tokens -= cost
            if self.num_requests == 0:
                self._busy = self._ends[-1]

    def seconds_left(self, excess: int = 0) -> int:
        """Until there is room, as requests have ended lately. excess: tokens that must end before."""
        busy = self._busy_time()
        ended = len(self._ends) - 1
        interval = (busy - self._ends[0]) / max(ended, 1)
        average = self.num_tokens / max(self.num_requests, 1)
        count = max(1, math.ceil(excess / average)) if average else 1
        return min(max(math.ceil(interval * count), 1), _LONGEST_WAIT)

    def _busy_time(self) -> float:
        return self._busy + (self._clock() - self._busy_since if self.num_requests else 0.0)
