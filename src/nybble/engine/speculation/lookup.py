"""Guesses that cost next to nothing: what a grammar forces, how a JSON text with a schema probably goes on, and what
followed when the same tokens stood in a text before.
"""

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
_OWN, _RECENT, _LAYOUT = 0, 1, 2
_LAYOUT_CHANCE = 0.85


@dataclass(slots=True)
class _State:
    """What is kept of a sequence between steps."""

    repeats: Repeats = field(default_factory=Repeats)
    # Of its own text, of recent ones, of the layout of its JSON text.
    odds: tuple[Odds, Odds, Odds] = field(default_factory=lambda: (Odds(), Odds(), Odds()))


class Lookup:
    """A Drafter over the grammar, the prompt and output of a sequence, and recent outputs of its tenant."""

    def __init__(self) -> None:
        self._recent = RecentTexts()
        self._states: dict[Sequence, _State] = {}
        # Of all sequences, by source and length of the match, which a layout has not.
        self._by_length = [Odds() for _ in range(_LAYOUT * _LENGTHS + 1)]

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
        by_grammar = self._by_grammar(sequence, state, limit)
        if by_grammar.is_forced:
            return by_grammar
        by_repeat = self._by_repeat(sequence, state, limit)
        return by_repeat if sum(by_repeat.chances) > sum(by_grammar.chances) else by_grammar

    def _by_grammar(self, sequence: Sequence, state: _State, limit: int) -> Draft:
        if sequence.matcher is None:
            return Draft(self)
        forced = sequence.matcher.forced_tokens()[:limit]
        likely = sequence.matcher.likely_tokens(limit)
        if len(likely) > len(forced):
            kind = _LAYOUT * _LENGTHS
            return self._with_chances(likely, self._chance(state, kind, _LAYOUT_CHANCE), kind)
        draft = self._with_chances(forced, _FORCED_CHANCE, _FORCED)
        draft.is_forced = bool(forced)
        return draft

    def _by_repeat(self, sequence: Sequence, state: _State, limit: int) -> Draft:
        repeats = state.repeats
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
        chance = self._chance(state, kind, prior=min(0.25 + 0.08 * length, 0.9))
        return self._with_chances(list(found), chance, kind)

    def _chance(self, state: _State, kind: int, prior: float) -> float:
        return state.odds[kind // _LENGTHS].chance(self._by_length[kind].chance(prior))

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
