"""Speculation: tokens that probably follow go through the model together with the one that is due.

What is drawn at each of their places is drawn as it would be without them (a draw depends on the logits, the seed and
the position alone), and the first one that differs from its guess ends the step for its sequence. So the text is the
same to the bit, greedy or seeded, and its distribution is exact: a guess of probability p is kept with probability p,
which is what rejection sampling (Leviathan et al. 2023, arXiv 2211.17192) gives a drafter that is sure of its guess.

Guesses come from a grammar that leaves no choice, and from what followed when the last tokens stood in the text before.
Whether they pay is a matter of two estimates: the chance that a guess is right, and what a longer step costs here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nybble.core.errors import ConfigError
from nybble.engine.repeats import Repeats
from nybble.engine.request import Sequence
from nybble.engine.scheduler import Scheduled, Scheduler
from nybble.engine.step_costs import StepCosts

Speculate = Literal["auto", "off", "ngram"]
MODES: tuple[Speculate, ...] = ("auto", "off", "ngram")

MAX_GUESSES = 24  # of a sequence in a step
_MIN_GAIN = 1.05  # tokens per second, against none
_MIN_MATCH = 2  # tokens that must have stood in the text before
_FORCED = 0.99  # a grammar leaves no choice
_PRIOR_WEIGHT = 4.0
_FORGET = 0.95  # how much of what was seen counts at the next look


def parse_mode(text: str) -> Speculate:
    """Raises ConfigError if nybble has no such way to speculate."""
    for mode in MODES:
        if text == mode:
            return mode
    raise ConfigError(f"speculate must be one of {', '.join(MODES)}, not {text!r}; draft models are not supported yet")


@dataclass(slots=True)
class _Odds:
    """How often guesses were right, recent ones counting more."""

    hits: float = 0.0
    tries: float = 0.0

    def add(self, hits: int, tries: int) -> None:
        self.hits = self.hits * _FORGET + hits
        self.tries = self.tries * _FORGET + tries

    def chance(self, prior: float) -> float:
        return (self.hits + _PRIOR_WEIGHT * prior) / (self.tries + _PRIOR_WEIGHT)


@dataclass(slots=True, eq=False)
class Guesses:
    """What a sequence keeps between steps."""

    repeats: Repeats
    odds: _Odds
    match_length: int = 0
    forced: int = 0  # how many of the first guesses the grammar forces


@dataclass(slots=True)
class SpeculationStats:
    """Totals since the start."""

    drafted: int = 0
    accepted: int = 0
    seconds_saved: float = 0.0


class Speculator:
    """Gives the sequences of a step their guesses, and learns from what became of them."""

    def __init__(self, mode: Speculate, scheduler: Scheduler, max_step_tokens: int) -> None:
        self.mode = mode
        self.stats = SpeculationStats()
        self._scheduler = scheduler
        self._max_step_tokens = max_step_tokens
        self._costs = StepCosts()
        self._by_length = [_Odds() for _ in range(9)]  # of all sequences, by the length of the match

    def plan(self, scheduled: Scheduled) -> None:
        """Set `guesses` of the sequences for which that makes the step worth more than it costs."""
        if self.mode == "off":
            return
        drawing = [s for s, n in scheduled if n == s.num_missing_tokens and s.request.pooling is None]
        num_tokens = sum(n for _, n in scheduled)
        room = self._max_step_tokens - num_tokens
        base = self._costs.seconds(num_tokens)
        able = [s for s, n in scheduled if n == 1 and s.num_output_tokens > 0 and s.num_missing_tokens == 1]
        if not able or room <= 0 or (self.mode == "auto" and base is None):
            return
        found = [(s, *self._guess(s)) for s in able]
        chances = sorted(
            ((chance, place) for place, (_, _, all_chances) in enumerate(found) for chance in all_chances), reverse=True
        )[:room]
        taken = len(chances) if self.mode == "ngram" else self._worth(chances, len(drawing), num_tokens, base or 0.0)
        wanted = [0] * len(found)
        for _, place in chances[:taken]:
            wanted[place] += 1
        for (sequence, guesses, _), count in zip(found, wanted, strict=True):
            sequence.guesses = guesses[: self._scheduler.make_room_for_guesses(sequence, count)]

    def _worth(self, chances: list[tuple[float, int]], num_draws: int, num_tokens: int, base: float) -> int:
        """How many guesses, the likeliest first, give the most tokens per second."""
        best, best_rate = 0, _MIN_GAIN * num_draws / base
        expected = float(num_draws)
        for count, (chance, _) in enumerate(chances, 1):
            expected += chance
            seconds = self._costs.seconds(num_tokens + count)
            if seconds is not None and expected / seconds > best_rate:
                best, best_rate = count, expected / seconds
        return best

    def _guess(self, sequence: Sequence) -> tuple[list[int], list[float]]:
        """Guesses, and the chance of each that it and all before it are right."""
        state = sequence.speculation
        if state is None:
            state = sequence.speculation = Guesses(Repeats(), _Odds())
        state.repeats.extend(sequence.token_ids[len(state.repeats.tokens) :])
        limit = min(MAX_GUESSES, sequence.max_total_tokens - len(sequence.token_ids) - 1)
        if limit <= 0:
            return [], []
        forced = sequence.matcher.forced_tokens()[:limit] if sequence.matcher is not None else []
        state.forced = len(forced)
        state.match_length = state.repeats.match_length
        guesses = list(forced)
        chance = _FORCED if forced else self._chance(state)
        if not forced and state.match_length >= _MIN_MATCH:
            guesses += state.repeats.continuation(limit)
        chances, all_right = [], 1.0
        for _ in guesses:
            all_right *= chance
            chances.append(all_right)
        return guesses, chances

    def _chance(self, state: Guesses) -> float:
        prior = min(0.25 + 0.08 * state.match_length, 0.9)
        return state.odds.chance(self._by_length[min(state.match_length, 8)].chance(prior))

    def _learn(self, sequence: Sequence, num_right: int) -> None:
        state, count = sequence.speculation, len(sequence.guesses)
        sequence.guesses = []
        if state is None or count == 0:
            return
        self.stats.drafted += count
        self.stats.accepted += num_right
        metrics = sequence.request.metrics
        metrics.num_guesses += count
        metrics.num_right_guesses += num_right
        if state.forced == 0:
            tries = min(num_right + 1, count)  # guesses behind a wrong one say nothing
            state.odds.add(num_right, tries)
            self._by_length[min(state.match_length, 8)].add(num_right, tries)

    def ran(self, num_tokens: int, seconds: float) -> None:
        """How long the model took for a step."""
        self._costs.add(num_tokens, seconds)

    def learn_all(self, drawn: list[tuple[Sequence, int]], num_tokens: int, seconds: float) -> None:
        """What became of the guesses of a step: of each sequence that drew, how many of its own were right."""
        num_guesses = sum(len(sequence.guesses) for sequence, _ in drawn)
        if num_guesses == 0:
            return
        plain = self._costs.seconds(num_tokens - num_guesses)
        if plain is not None:  # the right ones would have taken steps of their own, shared with the other sequences
            num_right = sum(right for _, right in drawn)
            self.stats.seconds_saved += plain * (1 + num_right / len(drawn)) - seconds
        for sequence, num_right in drawn:
            self._learn(sequence, num_right)
            self._scheduler.drop_guesses(sequence)
