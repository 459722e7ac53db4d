"""How a JSON text is laid out, learnt while it is written: which white space will stand between its next two parts.

A grammar leaves white space free, so that only a guess can tell what follows a value. But a text keeps to its layout:
what stood after the first comma of an object stands after the second, and one object of a list looks like the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

WHITE_SPACE = b" \t\n\r"
_QUOTE, _BACKSLASH = b'"\\'
_OPENING, _CLOSING = b"{[", b"}]"
_COMMA, _COLON = b",:"
_DEEPEST = 64  # levels whose layout is kept


@dataclass(slots=True)
class JsonLayout:
    """The state of one text. Only what white space, strings and brackets are is known of JSON."""

    in_string: bool = False
    _escaped: bool = False
    _previous: int = 0  # the last byte that is not white space; 0: none yet
    _depth: int = 0  # brackets that are open
    _white: bytes = b""  # since `_previous`
    _seen: dict[tuple[str, int], bytes] = field(default_factory=dict)  # white space by kind of place, and depth or byte

    def copy(self) -> JsonLayout:
        """One that goes on by itself."""
        return replace(self, _seen=dict(self._seen))

    def feed(self, data: bytes) -> None:
        """The text goes on with these bytes."""
        for byte in data:
            if self.in_string:
                self._feed_string(byte)
            elif byte in WHITE_SPACE:
                self._white += bytes([byte])
            else:
                self._feed_outside(byte)

    def _feed_string(self, byte: int) -> None:
        if self._escaped:
            self._escaped = False
        elif byte == _BACKSLASH:
            self._escaped = True
        elif byte == _QUOTE:
            self.in_string, self._previous = False, byte

    def _feed_outside(self, byte: int) -> None:
        place = self._place(byte)
        if place is not None and self._depth <= _DEEPEST:
            self._seen[place] = self._white
        self._white = b""
        self._depth = max(self._depth + (byte in _OPENING) - (byte in _CLOSING), 0)
        self._previous, self.in_string = byte, byte == _QUOTE

    def _place(self, byte: int) -> tuple[str, int] | None:
        """Between which two parts white space stands, if `byte` comes next; None where nothing is learnt."""
        if byte in _CLOSING:
            return None if self._previous in _OPENING else ("close", self._depth)
        if byte in (_COLON, _COMMA):
            return ("before", byte * 256 + (self._previous if self._previous in b'"]}' else 0))
        if self._previous == _COLON:
            return ("colon", 0)
        if self._previous == _COMMA:
            return ("comma", self._depth)
        return ("open", self._depth) if self._previous in _OPENING else None

    def gap(self, byte: int) -> bytes | None:
        """What white space probably still comes before `byte`, which is not white space; None if nothing tells."""
        place = None if self.in_string else self._place(byte)
        expected = None if place is None else self._expected(*place)
        if expected is None:
            return None
        # Some white space stands there that is not as expected: then that was all of it.
        return expected[len(self._white) :] if expected.startswith(self._white) else b""

    def _expected(self, kind: str, at: int) -> bytes | None:
        seen = self._seen.get((kind, at))
        if seen is not None:
            return seen
        if kind == "before":
            return b""
        if kind == "colon":
            return b" "
        if kind == "open":
            return self._deeper(at)
        opened = self._seen.get(("open", at))
        if kind == "comma":
            return opened if opened is not None and b"\n" in opened else self._expected("colon", 0)
        if opened is None or b"\n" not in opened:
            return opened
        return b"\n" if at == 1 else self._seen.get(("open", at - 1))

    def _deeper(self, depth: int) -> bytes | None:
        """White space after an opening bracket where none stood so deep: indented like the levels above."""
        above = self._seen.get(("open", depth - 1))
        if above is None or b"\n" not in above:
            return above
        before = self._seen.get(("open", depth - 2), b"\n")
        return above + above[len(before) :]
