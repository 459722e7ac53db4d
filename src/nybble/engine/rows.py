"""From a request's parameters to how each of its tokens is drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from nybble.backends.cpu import SampleRow
from nybble.core.errors import ConfigError
from nybble.core.sampling import SamplingParams
from nybble.engine.request import Sequence

Bitmask = npt.NDArray[np.uint32]


class DrawRules:
    """What holds for all tokens of a request, prepared once.

    Raises:
        ConfigError: a token id is not in the vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        encode: Callable[[str], list[int]] | None,
    ) -> None:
        self.params = params
        self._words = (vocab_size + 31) // 32
        bias = params.logit_bias or {}
        _check_ids("logit_bias", bias, vocab_size)
        _check_ids("allowed_token_ids", params.allowed_token_ids or (), vocab_size)
        _check_ids("stop_token_ids", params.stop_token_ids or (), vocab_size)
        self._bias = tuple((token_id, float(value)) for token_id, value in bias.items())
        self._allowed = None if params.allowed_token_ids is None else _bitmask(params.allowed_token_ids, self._words)
        ends = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else set(eos_token_ids))
        self._ends = tuple(sorted(i for i in ends if i < vocab_size))
        self._bad = _bad_sequences(params.bad_words or (), encode)
        self._longest_bad = max(map(len, self._bad), default=0)
        self._penalises = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        self._prompt_ids: npt.NDArray[np.int32] | None = None  # made when the first token is drawn

    def row(self, sequence: Sequence) -> SampleRow:
        """How the next token of the sequence is drawn."""
        params = self.params
        count = sequence.num_output_tokens
        # A text that is complete for its grammar ends, however short it is.
        complete = sequence.matcher is not None and sequence.matcher.is_finished()
        banned = self._ends if count < params.min_tokens and not complete else ()
        if self._bad:
            banned += self._banned_words(sequence)
        mask = self._mask(sequence)
        if sequence.matcher is not None and mask is not None:
            _check_something_is_left(mask, banned)
        prompt_ids = output_ids = None
        if self._penalises:
            if self._prompt_ids is None:
                self._prompt_ids = np.array(sequence.request.prompt_token_ids, np.int32)
            prompt_ids, output_ids = self._prompt_ids, sequence.output_array()
        return SampleRow(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=sequence.seed,
            position=count,
            logprobs=params.logprobs,
            allowed_mask=mask,
            banned_ids=banned,
            logit_bias=self._bias,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            prompt_ids=prompt_ids,
            output_ids=output_ids,
        )

    def _mask(self, sequence: Sequence) -> Bitmask | None:
        if sequence.matcher is None:
            return self._allowed
        mask = np.empty(self._words, np.uint32)
        sequence.matcher.fill_mask(mask)
        if self._allowed is not None:
            mask &= self._allowed
        return mask

    def _banned_words(self, sequence: Sequence) -> tuple[int, ...]:
        """Last tokens of bad words of which all others have just been generated."""
        count = min(sequence.num_output_tokens, self._longest_bad - 1)
        tail = tuple(sequence.token_ids[len(sequence.token_ids) - count :])
        return tuple(
            word[-1]
            for word in self._bad
            if len(word) == 1 or (len(word) - 1 <= count and tail[count + 1 - len(word) :] == word[:-1])
        )


def _check_something_is_left(mask: Bitmask, banned: tuple[int, ...]) -> None:
    """Raises ConfigError if a grammar and the other rules of a request exclude each other."""
    if banned:
        mask = mask.copy()
        for token_id in banned:
            mask[token_id // 32] &= ~np.uint32(1 << token_id % 32)
    if not mask.any():
        raise ConfigError(
            "structured_outputs with allowed_token_ids, bad_words or min_tokens leaves no token to go on with"
        )


def _bad_sequences(words: object, encode: Callable[[str], list[int]] | None) -> list[tuple[int, ...]]:
    """Each word as it is written at the start of a text, and after a space."""
    sequences: set[tuple[int, ...]] = set()
    for word in words if isinstance(words, tuple) else ():
        if encode is None:
            raise ConfigError("bad_words needs a tokenizer: name token ids in logit_bias instead")
        bare = word.lstrip()
        sequences |= {tuple(encode(bare)), tuple(encode(" " + bare))} - {()}
    return sorted(sequences)


def _bitmask(ids: object, words: int) -> Bitmask:
    bits = np.zeros(words * 32, np.uint8)
    bits[list(ids) if isinstance(ids, tuple) else []] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _check_ids(name: str, ids: object, vocab_size: int) -> None:
    for token_id in ids if isinstance(ids, tuple | dict) else ():
        if not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise ConfigError(
                f"{name} holds {token_id!r}, which is not a token id of this model (0 to {vocab_size - 1})"
            )
