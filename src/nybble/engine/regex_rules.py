"""What a regular expression of a request may contain.

The matcher reads Rust's syntax, JSON Schema means ECMAScript's. An expression that the two read differently, or one
that costs far more than its length suggests, is refused here, in one sentence, before the matcher sees it.
"""

from __future__ import annotations

import re

from nybble.core.errors import ConfigError

MAX_CHARS = 8192
MAX_GROUPS = 40  # nested
MAX_ATOMS = 20_000  # characters of the longest text without `*` and `+`: repeats multiplied out
_REPEAT = re.compile(r"\{\s*(\d*)\s*(?:(,)\s*(\d*)\s*)?\}")
_GROUP = re.compile(r"\?(?::|P?<(?![=!])[^>]*>|[is]+[:)])")
_LOOK_AROUND = ("?=", "?!", "?<=", "?<!")
_SET_OPERATORS = ("&&", "--", "~~")


def check_regex(source: str, what: str) -> None:
    """Refuses an expression that is too costly or that means something else elsewhere.

    what: how the message names the expression. Raises ConfigError.
    """
    if len(source) > MAX_CHARS:
        raise ConfigError(f"{what} has {len(source)} characters, more than {MAX_CHARS}")
    _Scanner(source, what).run()


class _Scanner:
    """One pass over the expression that follows classes, groups and counted repeats."""

    def __init__(self, source: str, what: str) -> None:
        self._source = source
        self._what = what
        self._at = 0
        self._sizes = [0]  # of the open groups, innermost last
        self._last = 0  # size of the atom that a repeat would apply to

    def run(self) -> None:
        steps = {"\\": self._escape, "[": self._class, "(": self._open, ")": self._close, "{": self._repeat}
        while self._at < len(self._source):
            steps.get(self._source[self._at], self._plain)()
            if sum(self._sizes) + self._last > MAX_ATOMS:
                raise self._error(f"describes texts of more than {MAX_ATOMS} counted characters")

    def _error(self, reason: str) -> ConfigError:
        shown = self._source if len(self._source) <= 80 else self._source[:80] + "…"
        return ConfigError(f"{self._what} {shown!r} {reason}")

    def _atom(self, size: int) -> None:
        self._sizes[-1] += self._last
        self._last = size

    def _plain(self) -> None:
        char = self._source[self._at]
        if "\ud800" <= char <= "\udfff":
            raise self._error("holds a lone surrogate")
        self._at += 1
        if char not in "*+?|":
            self._atom(1)

    def _escape(self) -> None:
        char = self._source[self._at + 1 : self._at + 2]
        if char in ("b", "B", "<", ">"):
            raise self._error(f"uses \\{char}, which the matcher does not know")
        if char.isdigit():
            raise self._error("uses a back-reference, which is not supported")
        self._at += 2
        self._atom(1)

    def _class(self) -> None:
        at = self._at + 1
        if self._source[at : at + 1] == "^":
            at += 1
        start = at
        while at < len(self._source) and (self._source[at] != "]" or at == start):
            char = self._source[at]
            if char == "[" or self._source[at : at + 2] in _SET_OPERATORS:
                shown = char if char == "[" else self._source[at : at + 2]
                raise self._error(f"has {shown!r} inside a class, which engines read differently: escape it")
            at += 2 if char == "\\" else 1
        self._at = at + 1
        self._atom(1)

    def _open(self) -> None:
        if self._source.startswith(_LOOK_AROUND, self._at + 1):
            raise self._error("uses look-around, which is not supported")
        group = _GROUP.match(self._source, self._at + 1)
        if group is None and self._source.startswith("?", self._at + 1):
            raise self._error("uses a group or flag that is not supported (known: (?:…), (?<name>…), (?i), (?s))")
        self._at = self._at + 1 if group is None else group.end()
        if group is not None and group.group().endswith(")"):
            return  # flags alone, no group
        self._atom(0)
        self._sizes.append(0)
        if len(self._sizes) > MAX_GROUPS:
            raise self._error(f"nests more than {MAX_GROUPS} groups")

    def _close(self) -> None:
        self._at += 1
        if len(self._sizes) == 1:
            raise self._error("closes a group that it never opened")
        size = self._sizes.pop() + self._last
        self._last = size

    def _repeat(self) -> None:
        found = _REPEAT.match(self._source, self._at)
        if found is None:
            raise self._error("has a '{' that starts no repeat: escape it")
        low, comma, high = found.groups()
        if not low or len(low) > 6 or len(high or "") > 6:
            raise self._error(f"has the repeat {found.group()}, which is not of the form {{n}}, {{n,}} or {{n,m}}")
        if comma and high and int(high) < int(low):
            raise self._error(f"has the repeat {found.group()}, whose end lies before its start")
        self._at = found.end()
        self._last *= max(1, int(low), int(high or 0))
