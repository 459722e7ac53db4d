"""The tokens that probably follow in a JSON text: what its schema forces, and white space as its layout lets expect.

Unlike forced tokens these are a guess, as a schema leaves white space free. It ends where the text has a real choice.
"""

from __future__ import annotations

import llguidance
import numpy as np

from nybble.engine.grammar_vocabulary import GrammarVocabulary
from nybble.engine.json_layout import JsonLayout

_BYTES_PER_TOKEN = 6  # of a guess, at most, in the mean
_NUMBER = frozenset(b"-0123456789")


def likely_tokens(
    matcher: llguidance.LLMatcher, vocabulary: GrammarVocabulary, layout: JsonLayout, limit: int
) -> list[int]:
    """At most `limit` tokens; [] if nothing can be told. The matcher and the layout are left as they are."""
    matcher, layout = matcher.deep_copy(), layout.copy()
    text, is_sure = b"", True
    while len(text) < limit * _BYTES_PER_TOKEN and not matcher.is_stopped():
        part = matcher.compute_ff_bytes() or (b"" if layout.in_string else _next_part(matcher, vocabulary, layout))
        if part is None:
            is_sure = False
            break
        if not part or not _consume(matcher, vocabulary, part):
            break
        text += part
        layout.feed(part)
    ids = vocabulary.encode(text.decode("utf-8", "ignore"))
    # Where the white space that follows is not known, it may be part of the last token.
    return (ids if is_sure else ids[:-1])[:limit]


def _next_part(matcher: llguidance.LLMatcher, vocabulary: GrammarVocabulary, layout: JsonLayout) -> bytes | None:
    """White space and the one byte that may follow it; b"" at a real choice, None if only the gap is unknown."""
    firsts = _first_bytes(matcher, vocabulary)
    if firsts and firsts <= _NUMBER:
        return layout.gap(min(firsts))
    if len(firsts) != 1 or GrammarVocabulary.END in firsts:
        return b""
    (byte,) = firsts
    gap = layout.gap(byte)
    return None if gap is None else gap + bytes([byte])


def _first_bytes(matcher: llguidance.LLMatcher, vocabulary: GrammarVocabulary) -> set[int]:
    """With which bytes, white space left out, the text may go on."""
    words = np.zeros((vocabulary.size + (not vocabulary.eos_token_ids) + 31) // 32, np.uint32)
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    allowed = np.unpackbits(words.view(np.uint8), count=vocabulary.size, bitorder="little").view(bool)
    found = set(np.unique(vocabulary.solid[allowed]).tolist())
    return found - {GrammarVocabulary.BLANK}


def _consume(matcher: llguidance.LLMatcher, vocabulary: GrammarVocabulary, data: bytes) -> bool:
    ids = vocabulary.guidance.tokenize_bytes(data)
    return bool(matcher.try_consume_tokens(ids) == len(ids))
