"""Log-probabilities in the two shapes that OpenAI has for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nybble.core.outputs import Logprob, PositionLogprobs
from nybble.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON knows no infinity


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[PositionLogprobs], top: int, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The shape of chats."""

    def entry(token_id: int, given: Logprob) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id) if token_id < tokenizer.vocab_size else b""
        return {
            "token": given.decoded_token or "",
            "logprob": max(given.logprob, _LOWEST),
            "bytes": list(raw),
        }

    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        best = sorted(position.items(), key=lambda item: -item[1].logprob)[:top]
        content.append({**entry(token_id, position[token_id]), "top_logprobs": [entry(i, given) for i, given in best]})
    return {"content": content, "refusal": None}


def completion_logprobs(
    token_ids: Iterable[int],
    positions: Iterable[PositionLogprobs | None],
    top: int,
    offset: int,
    *,
    first_text: str = "",
) -> dict[str, Any]:
    """The older shape of completions. offset: of the first token's text in the whole.

    first_text: of a prompt's first token, which has no log-probability.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    alternatives: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, position in zip(token_ids, positions, strict=True):
        given = None if position is None else position[token_id]
        text = (given.decoded_token or "") if given is not None else first_text
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if given is None else max(given.logprob, _LOWEST))
        if position is None:
            alternatives.append(None)
        else:
            best = sorted(position.values(), key=lambda other: -other.logprob)[:top]
            # From the least likely on: of several tokens with the same text, the likeliest one is told.
            alternatives.append({other.decoded_token or "": max(other.logprob, _LOWEST) for other in reversed(best)})
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": alternatives, "text_offset": offsets}
