"""A small model that guesses for a large one: its own cache of blocks, all sequences in one step.

It draws its guesses by the rules and with the random numbers by which the large model will draw at the same places, so
that where the two distributions agree the draws do, at any temperature. Whatever it guesses, the text stays the same.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace

import numpy as np

from nybble.backends.cpu import Sampled, SampleRow, Step
from nybble.cache.block_pool import BLOCK_SIZE, BlockPool
from nybble.engine.model import EngineModel
from nybble.engine.request import Sequence
from nybble.engine.scheduler import blocks_for
from nybble.engine.speculation.drafter import Draft, Odds
from nybble.engine.speculation.step_costs import StepCosts

logger = logging.getLogger(__name__)

_PRIOR = 0.7  # of a guess that has not been made; below what good pairs reach, so that a new pair is tried
_BINS = 10  # of a guess's probability under the draft
_FADE = 0.999  # per step: a draft that did not pay is tried again some time
_MOST_FAILURES = 3


@dataclass(slots=True)
class _State:
    """The draft's view of one sequence. Its first `num_computed` tokens are in the cache, then those in `guessed`."""

    blocks: list[int]
    num_computed: int
    num_published: int
    guessed: list[int] = field(default_factory=list)
    odds: Odds = field(default_factory=Odds)


@dataclass(frozen=True, slots=True)
class DraftWeights:
    """A model that may draft. context, vocab_size: longer texts and other tokens it cannot read."""

    model: EngineModel
    context: int
    vocab_size: int
    cache_bytes_per_block: int = 0


class DraftModel:
    """A Drafter that runs a model. `num_blocks`: of its cache.

    Raises:
        ConfigError: there is no memory for the cache.
    """

    def __init__(self, weights: DraftWeights, *, num_blocks: int, vocab_size: int) -> None:
        self._model = weights.model
        self._context = weights.context
        self._readable = weights.vocab_size
        self._vocab_size = vocab_size  # of the model that it guesses for
        self._states: dict[Sequence, _State] = {}
        self._costs = StepCosts()
        self._overall = Odds()
        self._by_probability = [Odds(forget=0.99) for _ in range(2 * _BINS)]  # for greedy requests, then for the others
        self._failures = 0
        self.pool = BlockPool(num_blocks)
        self._model.new_cache(num_blocks)

    def measure(self) -> None:
        """Find out what steps of 1, 8 and 64 tokens cost, as far as the cache holds them."""
        for num_tokens, times in ((1, 3), (8, 2), (64, 1)):
            if blocks_for(num_tokens) > self.pool.num_blocks or num_tokens > self._context:
                return
            blocks = self.pool.allocate(blocks_for(num_tokens))
            step = Step(
                token_ids=np.zeros(num_tokens, np.int32),
                cu_seqlens_q=np.array([0, num_tokens], np.int32),
                context_lens=np.zeros(1, np.int32),
                block_tables=np.array([blocks], np.int32),
                logit_rows=np.array([num_tokens - 1], np.int32),
            )
            self._model.execute(step)  # the first one is slow
            for _ in range(times):
                begin = time.monotonic()
                logits = self._model.execute(step)
                self._model.sample(logits, [SampleRow(temperature=0.0)])
                self._costs.add(num_tokens, 1, time.monotonic() - begin)
            self.pool.free(blocks)

    # ---- what the speculator asks ----

    def chance(self, sequence: Sequence) -> float:
        """As often as guesses were right lately: of this sequence, then of all."""
        if self._failures >= _MOST_FAILURES or len(sequence.token_ids) >= self._context:
            return 0.0
        state = self._states.get(sequence)
        overall = self._overall.chance(_PRIOR)
        return overall if state is None else state.odds.chance(overall)

    def seconds(self, num_sequences: int) -> float:
        """What one guess for each of so many sequences takes."""
        return self._costs.seconds(num_sequences, num_sequences) or 0.0

    def lag(self, sequence: Sequence) -> int:
        """Tokens that it has not read, the last one aside, which it reads with its first guess."""
        return len(sequence.token_ids) - self._follow(sequence).num_computed - 1

    def reading_seconds(self, num_tokens: int) -> float:
        """What it takes to read so many tokens."""
        per_token = self.seconds(64) / 64
        return num_tokens * per_token

    def read(self, sequences: list[Sequence], max_tokens: int) -> None:
        """Catch up with sequences by at most so many tokens in all."""
        pieces = []
        for sequence in sequences:
            state = self._follow(sequence)
            count = min(len(sequence.token_ids) - 1 - state.num_computed, max_tokens)
            if count > 0 and self._make_room(sequence, state, state.num_computed + count):
                pieces.append((sequence, state, count))
                max_tokens -= count
        if not pieces:
            return
        tokens = [s.token_ids[state.num_computed : state.num_computed + count] for s, state, count in pieces]
        if self._run([state for _, state, _ in pieces], tokens, []) is None:
            return
        for sequence, state, count in pieces:
            state.num_computed += count
            self._publish(sequence, state)

    def draft(self, sequences: list[Sequence], limits: list[int], floor: float) -> list[Draft]:
        """Guesses one after the other, for all sequences at once, as long as the next is likely enough to be used."""
        drafts = [Draft(self, [], []) for _ in sequences]
        active: list[_Active] = []
        for sequence, limit, draft in zip(sequences, limits, drafts, strict=True):
            state = self._follow(sequence)
            length = len(sequence.token_ids)
            limit = min(limit, self._context - length)
            row = _row(sequence)
            if row is not None and limit > 0 and self._make_room(sequence, state, length + limit):
                active.append(_Active(sequence, state, draft, limit, row, sequence.token_ids[state.num_computed :]))
        while active:
            drawn = self._guess(active)
            if drawn is None:
                break
            active = [one for one, guess in zip(active, drawn, strict=True) if self._take(one, guess, floor)]
        return drafts

    def learn(self, sequence: Sequence, draft: Draft, num_used: int, num_right: int) -> None:
        """Of each guess that was tried: whether it was right, by how sure the draft was."""
        tries = min(num_right + 1, num_used)
        for place, kind in enumerate(draft.kinds[:tries]):
            self._by_probability[kind].add(place < num_right, 1)
        self._overall.add(num_right, tries)
        state = self._states.get(sequence)
        if state is not None:
            state.odds.add(num_right, tries)

    def skip(self) -> None:
        """What was seen counts less, so that the draft is tried again some time."""
        self._overall.fade(_FADE)

    def end(self, sequence: Sequence) -> None:
        """Give its blocks back. What full ones hold is found again by a text that begins alike."""
        if sequence in self._states:
            self._publish(sequence, self._follow(sequence))
            self.pool.free(self._states.pop(sequence).blocks)

    # ---- its own cache ----

    def _follow(self, sequence: Sequence) -> _State:
        """The state of a sequence, in step with the tokens that it has by now."""
        state = self._states.get(sequence)
        if state is None:
            hits = []
            for index in range((len(sequence.token_ids) - 1) // BLOCK_SIZE):
                block = self.pool.lookup(sequence.hash_of_block(index))
                if block is None:
                    break
                self.pool.take(block)
                hits.append(block)
            state = self._states[sequence] = _State(hits, len(hits) * BLOCK_SIZE, len(hits))
        for token_id in state.guessed:
            if sequence.token_ids[state.num_computed : state.num_computed + 1] != [token_id]:
                break
            state.num_computed += 1
        state.guessed = []  # the slots behind those that were right are written again
        return state

    def _make_room(self, sequence: Sequence, state: _State, num_tokens: int) -> bool:
        """Blocks for so many tokens, if need be those of sequences that wait for their turn."""
        missing = blocks_for(num_tokens) - len(state.blocks)
        if missing > self.pool.num_free:
            for other in [s for s in self._states if s.slot < 0 and s is not sequence]:
                self.pool.free(self._states.pop(other).blocks)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            state.blocks += self.pool.allocate(missing)
        return True

    def _publish(self, sequence: Sequence, state: _State) -> None:
        for index in range(state.num_published, state.num_computed // BLOCK_SIZE):
            self.pool.publish(state.blocks[index], sequence.hash_of_block(index))
            state.num_published = index + 1

    # ---- a step ----

    def _guess(self, active: list[_Active]) -> list[Sampled] | None:
        states = [one.state for one in active]
        rows = [one.row for one in active]
        drawn = self._run(states, [one.unread for one in active], rows)
        if drawn is None:
            return None
        for one in active:
            if one.draft.tokens:
                one.state.guessed += one.unread
            else:
                one.state.num_computed += len(one.unread)
        return drawn

    def _take(self, one: _Active, guess: Sampled, floor: float) -> bool:
        """Note a guess; whether another one shall follow it."""
        if guess.token_id >= min(self._vocab_size, self._readable):
            return False
        probability = min(float(np.exp(guess.logprob)), 1.0)
        kind = min(int(probability * _BINS), _BINS - 1)
        if one.row.temperature > 0:
            kind += _BINS
        draft = one.draft
        before = draft.chances[-1] if draft.chances else 1.0
        chance = before * self._by_probability[kind].chance((kind % _BINS + 0.5) / _BINS)
        draft.tokens = [*draft.tokens, guess.token_id]
        draft.chances = [*draft.chances, chance]
        draft.kinds.append(kind)
        one.unread = [guess.token_id]
        one.row = _next_row(one.row, guess.token_id)
        return len(draft.tokens) < one.limit and chance * self.chance(one.sequence) >= floor

    def _run(self, states: list[_State], tokens: list[list[int]], rows: list[SampleRow]) -> list[Sampled] | None:
        """Run a step over what is unread, and draw from the last token of each state; None if that cannot be done."""
        counts = [len(unread) for unread in tokens]
        token_ids = np.array([token_id for unread in tokens for token_id in unread], np.int32)
        ends = np.cumsum(counts, dtype=np.int32)
        tables = np.zeros((len(states), max(len(state.blocks) for state in states)), np.int32)
        for row, state in enumerate(states):
            tables[row, : len(state.blocks)] = state.blocks
        step = Step(
            token_ids=token_ids,
            cu_seqlens_q=np.concatenate([np.zeros(1, np.int32), ends]),
            context_lens=np.array([state.num_computed + len(state.guessed) for state in states], np.int32),
            block_tables=tables,
            logit_rows=ends - 1 if rows else np.zeros(0, np.int32),
        )
        try:
            if int(token_ids.max()) >= self._readable:
                raise ValueError(f"token {int(token_ids.max())} is none of the draft model's")
            begin = time.monotonic()
            logits = self._model.execute(step)
            drawn = self._model.sample(logits, rows) if rows else []
            self._costs.add(len(token_ids), len(rows), time.monotonic() - begin)
        except Exception as error:  # the text does not need it
            self._failures += 1
            logger.warning("the draft model failed, so there are no guesses of it in this step: %s", error)
            return None
        return drawn


@dataclass(slots=True)
class _Active:
    """A sequence that gets one more guess. unread: what the draft model reads for it; row: how it draws then."""

    sequence: Sequence
    state: _State
    draft: Draft
    limit: int
    row: SampleRow
    unread: list[int]


def _row(sequence: Sequence) -> SampleRow | None:
    """How the next token is drawn; None if there is none, which its request will hear of in time."""
    try:
        return replace(sequence.request.rules.row(sequence), logprobs=0)
    except Exception:
        return None


def _next_row(row: SampleRow, token_id: int) -> SampleRow:
    """How a token behind a guess is drawn, but for the grammar, which would have moved on."""
    output_ids = None if row.output_ids is None else np.append(row.output_ids, np.int32(token_id))
    return replace(row, position=row.position + 1, allowed_mask=None, output_ids=output_ids)
