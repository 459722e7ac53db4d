"""Tokens of one sequence to text, piece by piece, cut at the first stop string."""

from __future__ import annotations

from typing import Protocol


class Detokenizer(Protocol):
    """Turns token ids into text and holds back bytes that are not a whole character yet."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """The text of a sequence as it may be shown.

    A tail that could be the start of a stop string is held back until it is decided, so text that was shown is never
    taken back, and a stop string is found wherever the borders between tokens fall.
    """

    def __init__(
        self, detokenizer: Detokenizer | None, stop: tuple[str, ...] = (), *, include_stop: bool = False
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._held = ""
        self.stopped_by: str | None = None  # the stop string that was found; nothing more comes

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self.stopped_by is not None

    def push(self, token_id: int, *, look_for_stop: bool = True) -> str:
        """The text that this token makes certain."""
        if self._detokenizer is None or self.stopped:
            return ""
        piece = self._detokenizer.push(token_id)
        if not look_for_stop:
            return piece
        return self._release(piece, final=False)

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        if self._detokenizer is None or self.stopped:
            return ""
        return self._release(self._detokenizer.flush(), final=True)

    def _release(self, piece: str, *, final: bool) -> str:
        text = self._held + piece
        found = [(at, stop) for at, stop in ((text.find(stop), stop) for stop in self._stop) if at >= 0]
        if found:
            at, self.stopped_by = min(found)
            self._held = ""
            return text[: at + len(self.stopped_by)] if self._include_stop else text[:at]
        keep = 0 if final else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
