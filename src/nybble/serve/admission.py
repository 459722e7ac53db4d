"""How much may wait: bounded in requests and in tokens, with an honest guess of when to come back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from nybble.serve.errors import ApiError
from nybble.serve.settings import ServeSettings

_SMOOTHING = 0.2
_FIRST_GUESS = 50.0  # tokens per second, until something was measured


class Admission:
    """Counts what is under way. Belongs to one event loop."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self.num_requests = 0
        self.num_tokens = 0
        self.is_open = True  # False while the server drains
        self._rate = _FIRST_GUESS

    @contextmanager
    def admit(self, cost: int) -> Iterator[None]:
        """Let a request in that may take so many tokens.

        Raises:
            ApiError: 429 with Retry-After if too much waits, 503 while the server shuts down.
        """
        if not self.is_open:
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "30"})
        settings = self._settings
        full = self.num_requests >= settings.max_queue
        if full or (self.num_requests > 0 and self.num_tokens + cost > settings.max_queue_tokens):
            seconds = max(1, math.ceil(self.num_tokens / max(self.num_requests, 1) / self._rate))
            raise ApiError(
                429,
                f"{self.num_requests} requests with {self.num_tokens} tokens are under way: try again in {seconds} s",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )
        self.num_requests += 1
        self.num_tokens += cost
        begin = time.monotonic()
        try:
            yield
        finally:
            self.num_requests -= 1
            self.num_tokens -= cost
            took = time.monotonic() - begin
            if took > 0:
                # Many run at once: together they are that much faster than one of them.
                rate = cost / took * (self.num_requests + 1)
                self._rate += _SMOOTHING * (rate - self._rate)
