"""Tokens with their texts, as TGI tells them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nybble.core.outputs import Logprob, PositionLogprobs
from nybble.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON knows no infinity


class TokenTeller:
    """Describes the tokens of one sequence in their order. A character of several tokens is told with its last one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream(skip_special=False)

    def token(self, token_id: int, position: PositionLogprobs | None, *, is_last: bool = False) -> dict[str, Any]:
        """The next token. is_last: nothing follows that could complete a character."""
        text = self._stream.push(token_id) + (self._stream.flush() if is_last else "")
        return {
            "id": token_id,
            "text": text,
            "logprob": None if position is None else _value(position[token_id]),
            "special": token_id in self._tokenizer.special_token_ids,
        }

    def top(self, position: PositionLogprobs | None, count: int) -> list[dict[str, Any]]:
        """The likeliest tokens of a position, the likeliest first."""
        best = sorted((position or {}).items(), key=lambda item: -item[1].logprob)[:count]
        special = self._tokenizer.special_token_ids
        return [
            {"id": i, "text": one.decoded_token or "", "logprob": _value(one), "special": i in special}
            for i, one in best
        ]


def _value(given: Logprob) -> float:
    return max(given.logprob, _LOWEST)


def prefill(
    prompt: Sequence[int], positions: Sequence[PositionLogprobs | None] | None, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The tokens of a prompt, the first of which has no log-probability."""
    teller = TokenTeller(tokenizer)
    rows = positions or [None] * len(prompt)
    told = [teller.token(token_id, position) for token_id, position in zip(prompt, rows, strict=True)]
    return [{key: one[key] for key in ("id", "text", "logprob")} for one in told]


def with_offsets(token_ids: Iterable[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Tokens with the place of their texts in the whole, in characters."""
    teller, at, told = TokenTeller(tokenizer), 0, []
    for token_id in token_ids:
        text = teller.token(token_id, None)["text"]
        told.append({"id": token_id, "text": text, "start": at, "stop": at + len(text)})
        at += len(text)
    return told
