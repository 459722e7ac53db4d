"""What a download tells while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PullProgress:
    """How far a download is. total, completed: bytes of the file of this digest, None where there is no count."""

    status: str
    digest: str | None = None
    total: int | None = None
    completed: int | None = None


Tell = Callable[[PullProgress], None]
