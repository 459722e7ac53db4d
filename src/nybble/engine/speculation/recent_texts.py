"""What was written lately, so that an answer that resembles an earlier one can be guessed from it.

Texts are kept apart by the salt of their request, as the prefix cache keeps them: how fast an answer comes tells
nothing about the texts of other tenants. Memory is bounded, for each tenant and for all of them together.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

MIN_MATCH = 3  # tokens that must be equal
LONGEST_MATCH = 16  # beyond that nobody counts
_TENANT_TOKENS = 16_384
_ALL_TOKENS = 131_072  # about 20 MB with the index
_END = -1  # of a text


class RecentTexts:
    """The latest outputs of every tenant."""

    def __init__(self, tenant_tokens: int = _TENANT_TOKENS, all_tokens: int = _ALL_TOKENS) -> None:
        self._tenants: OrderedDict[str | None, _Tenant] = OrderedDict()  # the one that wrote last is the last
        self._half = max(tenant_tokens // 2, 1)
        self._all_tokens = all_tokens
        self.num_tokens = 0

    def add(self, salt: str | None, tokens: Sequence[int]) -> None:
        """Remember an output, at most as much of its end as there is room for."""
        tokens = tokens[-self._half :]
        if len(tokens) <= MIN_MATCH:  # nothing would follow a match
            return
        tenant = self._tenants.setdefault(salt, _Tenant())
        self._tenants.move_to_end(salt)
        self.num_tokens += tenant.add(tokens, self._half)
        while self.num_tokens > self._all_tokens and len(self._tenants) > 1:
            self.num_tokens -= self._tenants.popitem(last=False)[1].num_tokens

    def find(self, salt: str | None, tail: Sequence[int], max_tokens: int) -> tuple[int, Sequence[int]]:
        """How many tokens at the end of `tail` stood in a text of the tenant, and what followed there."""
        tenant = self._tenants.get(salt)
        return (0, ()) if tenant is None or len(tail) < MIN_MATCH else tenant.find(tail, max_tokens)


class _Half:
    """Texts, and where each three tokens stood last."""

    def __init__(self) -> None:
        self.tokens = array("i")
        self.index: dict[int, int] = {}

    def add(self, tokens: Sequence[int]) -> None:
        begin = len(self.tokens)
        self.tokens.extend(tokens)
        self.tokens.append(_END)
        for at in range(MIN_MATCH, len(tokens)):
            self.index[_key(tokens[at - MIN_MATCH : at])] = begin + at

    def find(self, tail: Sequence[int], max_tokens: int) -> tuple[int, Sequence[int]]:
        at = self.index.get(_key(tail[-MIN_MATCH:]))
        if at is None:
            return 0, ()
        length = MIN_MATCH
        while length < min(at, len(tail), LONGEST_MATCH) and self.tokens[at - length - 1] == tail[-length - 1]:
            length += 1
        found = self.tokens[at : at + max_tokens].tolist()
        return length, found[: found.index(_END)] if _END in found else found


class _Tenant:
    """Two halves: when the new one is full, the old one is forgotten."""

    def __init__(self) -> None:
        self._new, self._old = _Half(), _Half()

    @property
    def num_tokens(self) -> int:
        return len(self._new.tokens) + len(self._old.tokens)

    def add(self, tokens: Sequence[int], room: int) -> int:
        """By how many tokens this grew; negative if more was forgotten."""
        before = self.num_tokens
        if len(self._new.tokens) + len(tokens) > room:
            self._new, self._old = _Half(), self._new
        self._new.add(tokens)
        return self.num_tokens - before

    def find(self, tail: Sequence[int], max_tokens: int) -> tuple[int, Sequence[int]]:
        new, old = self._new.find(tail, max_tokens), self._old.find(tail, max_tokens)
        return old if old[0] > new[0] else new


def _key(tokens: Sequence[int]) -> int:
    first, second, third = tokens
    return (first << 42) | (second << 21) | third  # vocabularies stay below 2**21
