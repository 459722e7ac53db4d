"""Speculation: tokens that probably follow go through the model together with the one that is due.

What is drawn at each of their places is drawn as it would be without them (a draw depends on the logits, the seed and
the position alone), and the first one that differs from its guess ends the step for its sequence. So the text is the
same to the bit, greedy or seeded, and its distribution is exact: a guess of probability p is kept with probability p,
which is what rejection sampling (Leviathan et al. 2023, arXiv 2211.17192) gives a drafter that is sure of its guess.

Guesses come from a grammar that leaves no choice, from what followed when the last tokens stood in a text before, and
from a draft model. Whether they pay is a matter of estimates: the chance that a guess is right, what a longer step
costs here, and what the draft model costs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

from nybble.engine.request import Sequence
from nybble.engine.scheduler import Scheduled, Scheduler
from nybble.engine.speculation.drafter import Draft, Drafter
from nybble.engine.speculation.lookup import Lookup
from nybble.engine.speculation.mode import Speculation
from nybble.engine.speculation.step_costs import StepCosts

MAX_GUESSES = 24  # of a sequence in a step
_MIN_GAIN = 1.05  # speed against none
_NEAR = 32  # tokens that a drafter reads along with its first guess; more of them are read ahead of it
_READ_AHEAD = 256  # tokens of a step: other sequences wait for them
_BESIDE_PROMPTS = 0.05  # of a step that reads prompts: it is bound by arithmetic, so guesses keep the prompts waiting
_LONG_ENOUGH = 256  # tokens of an answer that reading its prompt once more must pay for


@dataclass(slots=True)
class SpeculationStats:
    """Totals since the start."""

    drafted: int = 0
    accepted: int = 0
    seconds_saved: float = 0.0


@dataclass(frozen=True, slots=True)
class _View:
    """A step as it would be without guesses."""

    num_draws: int
    num_tokens: int
    room: int  # for guesses
    seconds: float


class Speculator:
    """Gives the sequences of a step their guesses, and learns from what became of them.

    row_weight: the arithmetic of a row of logits in that of a token. drafter: of a draft model.
    """

    def __init__(
        self,
        mode: Speculation,
        scheduler: Scheduler,
        max_step_tokens: int,
        *,
        row_weight: float = 0.0,
        drafter: Drafter | None = None,
    ) -> None:
        self.stats = SpeculationStats()
        self._mode = mode
        self._scheduler = scheduler
        self._max_step_tokens = max_step_tokens
        self._costs = StepCosts(row_weight)
        self._lookup = Lookup()
        self._drafter = drafter
        self._used: dict[Sequence, Draft] = {}  # in this step

    # ---- before a step ----

    def plan(self, scheduled: Scheduled) -> None:
        """Set `guesses` of the sequences for which that makes the step worth more than it costs."""
        self._used = {}
        if self._mode.when == "off":
            return
        num_tokens = sum(n for _, n in scheduled)
        num_draws = sum(1 for s, n in scheduled if n == s.num_missing_tokens and s.request.pooling is None)
        base = self._costs.seconds(num_tokens, num_draws)
        able = [s for s, n in scheduled if n == 1 and s.num_output_tokens > 0 and s.num_missing_tokens == 1]
        room = self._max_step_tokens - num_tokens
        if any(n > 1 for _, n in scheduled):
            room = min(room, int(num_tokens * _BESIDE_PROMPTS))
        if not able or room <= 0 or (base is None and self._mode.when == "auto"):
            return
        view = _View(num_draws, num_tokens, room, base or 0.0)
        limits = [min(MAX_GUESSES, s.max_total_tokens - len(s.token_ids) - 1) for s in able]
        drafts = dict(zip(able, self._lookup.draft(able, limits, 0.0), strict=True))
        drafted = False
        if self._drafter is not None:
            begin = time.monotonic()
            drafted = self._draft(self._drafter, view, drafts, limits)
            self.stats.seconds_saved -= time.monotonic() - begin
        self._take(view, drafts, 1.0 if drafted else _MIN_GAIN)

    def _take(self, view: _View, drafts: dict[Sequence, Draft], min_gain: float) -> None:
        """Use the guesses that bring most, as many as pay."""
        gains = _gains((draft.chances for draft in drafts.values()), view.room)
        count = len(gains)
        if self._mode.when == "auto":
            count, _ = self._best(view, gains, 0.0, min_gain)
        wanted = [0] * len(drafts)
        for _, place in gains[:count]:
            wanted[place] += 1
        for (sequence, draft), number in zip(drafts.items(), wanted, strict=True):
            sequence.guesses = list(draft.tokens[: self._scheduler.make_room_for_guesses(sequence, number)])
            if sequence.guesses:
                self._used[sequence] = draft

    def _best(self, view: _View, gains: list[tuple[float, int]], extra: float, min_gain: float) -> tuple[int, float]:
        """How many guesses are best, the first of `gains`, and how many tokens per second they give.

        What counts is the geometric mean of the sequences' speeds, here times their number: those without guesses wait
        for the others', and a step that is twice as long must bring all of them twice as far, or some much farther.

        extra: seconds that making the guesses takes. min_gain: how much better than none they must be.
        """
        best, best_rate = 0, min_gain * view.num_draws / view.seconds
        total = 0.0
        for count, (gain, _) in enumerate(gains, 1):
            total += gain
            seconds = self._costs.seconds(view.num_tokens + count, view.num_draws + count)
            if seconds is not None:
                rate = view.num_draws * math.exp(total / view.num_draws) / (seconds + extra)
                if rate > best_rate:
                    best, best_rate = count, rate
        return best, best_rate

    # ---- a drafter whose guesses cost time ----

    def _draft(self, drafter: Drafter, view: _View, drafts: dict[Sequence, Draft], limits: list[int]) -> bool:
        """Let the drafter guess where that pays, in place of the lookup; whether it did."""
        longest = self._mode.draft_tokens
        limit_of = {s: min(limit, longest) for s, limit in zip(drafts, limits, strict=True)}
        open_ones = {s: drafter.chance(s) for s, limit in limit_of.items() if limit > 0}
        open_ones = {s: chance for s, chance in open_ones.items() if chance > 0 and not drafts[s].is_forced}
        rate, chosen = 0.0, list(open_ones)
        if self._mode.when == "auto":
            rate, chosen = self._worthwhile(drafter, view, drafts, open_ones)
        behind = [s for s in chosen if drafter.lag(s) > _NEAR]
        if behind:
            if self._mode.when == "always" or self._reading_pays(drafter, view, rate, behind):
                drafter.read(behind, _READ_AHEAD)
            chosen = [s for s in chosen if drafter.lag(s) <= _NEAR]
        if not chosen:
            drafter.skip()
            return False
        floor = 0.0
        if self._mode.when == "auto":  # a guess must bring more than the time that it takes
            one_more = self._costs.seconds(view.num_tokens + 1, view.num_draws + 1) or view.seconds
            floor = rate * (drafter.seconds(len(chosen)) / len(chosen) + max(one_more - view.seconds, 0.0))
        drafts |= zip(chosen, drafter.draft(chosen, [limit_of[s] for s in chosen], floor), strict=True)
        return True

    def _worthwhile(
        self, drafter: Drafter, view: _View, drafts: dict[Sequence, Draft], open_ones: dict[Sequence, float]
    ) -> tuple[float, list[Sequence]]:
        """Tokens per second with the drafter, and for which sequences; none if it is better left alone."""
        found = _gains((draft.chances for draft in drafts.values()), view.room)
        _, best_rate = self._best(view, found, 0.0, _MIN_GAIN)
        best: list[Sequence] = []
        previous = 0.0
        for count in range(1, self._mode.draft_tokens + 1):
            chosen, chances = [], list[Iterable[float]]()
            for sequence, draft in drafts.items():
                chance = open_ones.get(sequence, 0.0)
                own = [chance**n for n in range(1, count + 1)]
                if sum(own) > sum(draft.chances):
                    chosen.append(sequence)
                    chances.append(own)
                else:
                    chances.append(draft.chances)
            if not chosen:
                continue
            _, rate = self._best(view, _gains(chances, view.room), count * drafter.seconds(len(chosen)), 0.0)
            if rate > best_rate:
                best, best_rate = chosen, rate
            if rate < previous:
                break  # more of them cost more than they bring
            previous = rate
        return best_rate, best

    @staticmethod
    def _reading_pays(drafter: Drafter, view: _View, rate: float, behind: list[Sequence]) -> bool:
        """Whether what is left of the answers is long enough for what the drafter must read first."""
        left = sum(min(s.max_total_tokens - len(s.token_ids), _LONG_ENOUGH) for s in behind) / len(behind)
        saved = left * view.num_draws * (view.seconds / view.num_draws - 1 / rate)
        return saved > drafter.reading_seconds(sum(drafter.lag(s) for s in behind))

    # ---- after a step ----

    def ran(self, num_tokens: int, num_rows: int, seconds: float) -> None:
        """How long the model took for a step with rows of logits for so many of its tokens."""
        self._costs.add(num_tokens, num_rows, seconds)

    def learn_all(self, drawn: list[tuple[Sequence, int]], num_tokens: int, seconds: float) -> None:
        """What became of the guesses of a step: of each sequence that drew, how many of its own were right."""
        num_guesses = sum(len(sequence.guesses) for sequence, _ in drawn)
        if num_guesses == 0:
            return
        plain = self._costs.seconds(num_tokens - num_guesses, len(drawn))
        if plain is not None:  # the right ones would have taken steps of their own, shared with the other sequences
            num_right = sum(right for _, right in drawn)
            self.stats.seconds_saved += plain * (1 + num_right / len(drawn)) - seconds
        for sequence, num_right in drawn:
            self._learn(sequence, num_right)
            self._scheduler.drop_guesses(sequence)

    def _learn(self, sequence: Sequence, num_right: int) -> None:
        count, draft = len(sequence.guesses), self._used.get(sequence)
        sequence.guesses = []
        if count == 0 or draft is None:
            return
        self.stats.drafted += count
        self.stats.accepted += num_right
        metrics = sequence.request.metrics
        metrics.num_guesses += count
        metrics.num_right_guesses += num_right
        draft.drafter.learn(sequence, draft, count, num_right)

    def end(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        if self._mode.when != "off":
            self._lookup.end(sequence)
            if self._drafter is not None:
                self._drafter.end(sequence)


def _gains(chances: Iterable[Iterable[float]], room: int) -> list[tuple[float, int]]:
    """The guesses that bring most: by how much each raises the logarithm of its sequence's speed, and whose it is.

    chances: of each sequence, that its guesses up to the first, second, ... are all right.
    """
    gains = []
    for place, of_one in enumerate(chances):
        expected = 1.0
        for chance in of_one:
            gains.append((math.log1p(chance / expected), place))
            expected += chance
    gains.sort(reverse=True)
    return gains[:room]
