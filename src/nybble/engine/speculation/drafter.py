"""What makes guesses, as the speculator sees it.

Prompt lookup and a draft model are drafters. A head that reads the target's hidden states (EAGLE, MTP) would be one as
well: it lags behind a sequence until it has read it, and each round of guesses takes time.
"""

from __future__ import annotations

from collections.abc import Sequence as ReadOnly
from dataclasses import dataclass, field
from typing import Protocol

from nybble.engine.request import Sequence

_PRIOR_WEIGHT = 4.0


@dataclass(slots=True)
class Odds:
    """How often guesses were right, recent ones counting more."""

    hits: float = 0.0
    tries: float = 0.0
    forget: float = 0.95  # how much of what was seen counts at the next look

    def add(self, hits: int, tries: int) -> None:
        """So many of so many guesses were right."""
        self.hits = self.hits * self.forget + hits
        self.tries = self.tries * self.forget + tries

    def fade(self, factor: float) -> None:
        """Let what was seen count less."""
        self.hits *= factor
        self.tries *= factor

    def chance(self, prior: float) -> float:
        """That the next guess is right; `prior` where little has been seen."""
        return (self.hits + _PRIOR_WEIGHT * prior) / (self.tries + _PRIOR_WEIGHT)


@dataclass(slots=True)
class Draft:
    """Guesses for one sequence in one step.

    chances: for each guess, that it and all before it are right. kinds: by what its drafter learns about each guess.
    """

    drafter: Drafter
    tokens: ReadOnly[int] = ()
    chances: ReadOnly[float] = ()
    kinds: list[int] = field(default_factory=list)
    is_forced: bool = False  # by a grammar


class Drafter(Protocol):
    """Makes guesses for all sequences of one engine, in the engine's thread."""

    def chance(self, sequence: Sequence) -> float:
        """That a guess would be right, before it is made; 0: there can be none now."""

    def seconds(self, num_sequences: int) -> float:
        """What one guess for each of so many sequences takes."""

    def lag(self, sequence: Sequence) -> int:
        """How many tokens of the sequence it has not read."""

    def reading_seconds(self, num_tokens: int) -> float:
        """What it takes to read so many tokens."""

    def read(self, sequences: list[Sequence], max_tokens: int) -> None:
        """Catch up with sequences by at most so many tokens in all."""

    def draft(self, sequences: list[Sequence], limits: list[int], floor: float) -> list[Draft]:
        """At most so many guesses for each sequence; none behind one that is right with a chance below `floor`."""

    def learn(self, sequence: Sequence, draft: Draft, num_used: int, num_right: int) -> None:
        """The first `num_used` guesses went through the model, and the first `num_right` of them were right."""

    def skip(self) -> None:
        """A step went by without a guess of it, as none would have paid."""

    def end(self, sequence: Sequence) -> None:
        """The sequence has ended."""
