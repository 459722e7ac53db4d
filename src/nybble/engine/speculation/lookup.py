"""Guesses that cost nothing: what a grammar forces, and what followed when the same tokens stood in a text before."""

from __future__ import annotations

from dataclasses import dataclass, field

from nybble.engine.request import Sequence
from nybble.engine.speculation.drafter import Draft, Odds
from nybble.engine.speculation.recent_texts import LONGEST_MATCH, RecentTexts
from nybble.engine.speculation.repeats import Repeats

MIN_MATCH = 2  # tokens that must have stood in the text before
_FORCED_CHANCE = 0.99
_FORCED = -1
_LENGTHS = 9  # matches of 0 to 8 tokens, and longer ones
_OWN, _RECENT = 0, 1


@dataclass(slots=True)
class _State:
    """What is kept of a sequence between steps."""

    repeats: Repeats = field(default_factory=Repeats)
    odds: tuple[Odds, Odds] = field(default_factory=lambda: (Odds(), Odds()))  # of its own text, of recent ones


class Lookup:
    """A Drafter over the grammar, the prompt and output of a sequence, and recent outputs of its tenant."""

    def __init__(self) -> None:
        self._recent = RecentTexts()
        self._states: dict[Sequence, _State] = {}
        self._by_length = [Odds() for _ in range(2 * _LENGTHS)]  # of all sequences, by source and length of the match

    def chance(self, sequence: Sequence) -> float:
        """It makes its guesses at once instead, with a chance for each."""
        return 0.0

    def seconds(self, num_sequences: int) -> float:
        """Nothing beside a step of a model."""
        return 0.0

    def lag(self, sequence: Sequence) -> int:
        """It reads when it is asked."""
        return 0

    def reading_seconds(self, num_tokens: int) -> float:
        """Nothing."""
        return 0.0

    def read(self, sequences: list[Sequence], max_tokens: int) -> None:
        """It reads when it is asked."""

    def draft(self, sequences: list[Sequence], limits: list[int], floor: float) -> list[Draft]:
        """Forced tokens if there are any, else what followed the longest match."""
        return [self._draft(*one) for one in zip(sequences, limits, strict=True)]

    def _draft(self, sequence: Sequence, limit: int) -> Draft:
        state = self._states.get(sequence)
        if state is None:
            state = self._states[sequence] = _State()
        repeats = state.repeats
        repeats.extend(sequence.token_ids[len(repeats.tokens) :])
        if limit <= 0:
            return Draft(self)
        forced = sequence.matcher.forced_tokens()[:limit] if sequence.matcher is not None else []
        if forced:
            draft = self._with_chances(forced, _FORCED_CHANCE, _FORCED)
            draft.is_forced = True
            return draft
        source, length = _OWN, repeats.match_length
        recent_length, found = self._recent.find(
            sequence.request.cache_salt, sequence.token_ids[-LONGEST_MATCH:], limit
        )
        if recent_length > length:
            source, length = _RECENT, recent_length
        elif length >= MIN_MATCH:
            found = repeats.continuation(limit)
        else:
            return Draft(self)
        kind = source * _LENGTHS + min(length, _LENGTHS - 1)
        prior = min(0.25 + 0.08 * length, 0.9)
        chance = state.odds[source].chance(self._by_length[kind].chance(prior))
        return self._with_chances(list(found), chance, kind)

    def _with_chances(self, tokens: list[int], chance: float, kind: int) -> Draft:
        chances, all_right = [], 1.0
        for _ in tokens:
            all_right *= chance
            chances.append(all_right)
        return Draft(self, tokens, chances, [kind] * len(tokens))

    def learn(self, sequence: Sequence, draft: Draft, num_used: int, num_right: int) -> None:
        """Nothing is learnt from what a grammar forced."""
        state, kind = self._states.get(sequence), draft.kinds[0]
        tries = min(num_right + 1, num_used)  # guesses behind a wrong one say nothing
        if kind != _FORCED:
            self._by_length[kind].add(num_right, tries)
            if state is not None:
                state.odds[kind // _LENGTHS].add(num_right, tries)

    def skip(self) -> None:
        """It is asked in every step."""

    def end(self, sequence: Sequence) -> None:
        """Its output may help the next one of its tenant."""
        self._states.pop(sequence, None)
        if sequence.num_output_tokens:
            self._recent.add(sequence.request.cache_salt, sequence.token_ids[sequence.num_prompt_tokens :])
