"""Token ids to text, one at a time, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class Detokenizer:
    """Streams the text of one sequence.

    token_bytes: the bytes of a token, b"" for those that are not shown. strip_space: the first space of the text
    stands for the start of the text (SentencePiece) and is dropped.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, strip_space: bool = False) -> None:
        self._token_bytes = token_bytes
        self._strip_space = strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes. Bytes of an unfinished character wait for the next token."""
        return self._decode(self._token_bytes(token_id), final=False)

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character was cut."""
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, *, final: bool) -> str:
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data, final)
