"""What requests want of hidden states: the log-probabilities of their prompts, or one vector for a text.

A request that was preempted goes through the model again, perhaps cut in other places: what has been taken already is
not taken twice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nybble.engine.model import EngineModel, Floats
from nybble.engine.request import Request, Sequence
from nybble.engine.tell import TokenText, position_logprobs

# A sequence, the position of the first token whose hidden state is wanted, and how many follow each other.
Wanted = tuple[Sequence, int, int]


def hidden_wanted(sequence: Sequence, begin: int, num_tokens: int) -> tuple[int, int]:
    """Of which tokens of this piece the hidden states are wanted: the first position and the count."""
    request = sequence.request
    prompt = sequence.num_prompt_tokens
    if request.pooling == "mean":
        return begin, num_tokens
    if request.pooling == "last":
        return prompt - 1, int(begin <= prompt - 1 < begin + num_tokens)
    if request.params.prompt_logprobs is not None:
        first = max(begin, len(request.prompt_logprobs) - 1)  # the entry of a token tells of the one before it
        return first, max(min(begin + num_tokens, prompt - 1) - first, 0)
    return begin, 0


class HiddenUser:
    """Hands hidden states to the requests that asked for them."""

    def __init__(self, model: EngineModel, token_text: TokenText, fail: Callable[[Request, Exception], None]) -> None:
        self._model = model
        self._token_text = token_text
        self._fail = fail

    def use(self, wanted: list[Wanted], states: Floats) -> None:
        """states: one row for each wanted token, in order. An error ends the request that it belongs to."""
        row = 0
        for sequence, first, count in wanted:
            rows, row = states[row : row + count], row + count
            request = sequence.request
            try:
                if request.pooling is not None:
                    _pool(request, rows, first)
                else:
                    self._score_prompt(request, rows, first)
            except Exception as error:
                self._fail(request, error)

    def _score_prompt(self, request: Request, rows: Floats, first: int) -> None:
        targets = request.prompt_token_ids[first + 1 : first + 1 + len(rows)]
        scored = self._model.score_hidden(rows, targets, request.params.prompt_logprobs or 0)
        if not request.prompt_logprobs:
            request.prompt_logprobs.append(None)
        request.prompt_logprobs += [
            position_logprobs(token_id, s.logprob, s.rank, s.top_logprobs, self._token_text)
            for token_id, s in zip(targets, scored, strict=True)
        ]


def _pool(request: Request, rows: Floats, first: int) -> None:
    if request.pooling == "last" or first == 0 or request.pooled is None:
        request.pooled = np.zeros(rows.shape[1], np.float64)
    for state in rows:  # one by one, so that the sum does not depend on how the text was cut
        request.pooled += state
