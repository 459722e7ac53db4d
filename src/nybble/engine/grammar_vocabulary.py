"""llguidance's view of a tokenizer: the bytes of every token, which are control tokens, how text becomes tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import llguidance
import numpy as np
import numpy.typing as npt

from nybble.engine.json_layout import WHITE_SPACE
from nybble.tokenizer import Tokenizer

_CANONICAL_CHARS = 256  # of a text that are split as the model learned it; the rest in any way
_SENTINEL = "\0"  # stands before a text so that no start-of-text space is put in front of it


class _Vocabulary:
    """What llguidance asks of a tokenizer; the attribute names are its own."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_id: int | None) -> None:
        known = min(tokenizer.vocab_size, size)
        special = tokenizer.special_token_ids
        # Tokens of no bytes are never allowed: the rows of a padded head, and holes in the vocabulary.
        self.tokens = [tokenizer.token_bytes(i) for i in range(known)] + [b""] * (size - known)
        self.special_token_ids = sorted(i for i in special if i < known and self.tokens[i])
        self.eos_token_id = eos_token_id  # None: llguidance adds a token of its own after ours
        self._tokenizer = tokenizer
        self.fallback: llguidance.LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text in the middle of another one: their bytes are exactly those of the text.

        llguidance asks at every step for all the text that must follow, and uses its first token.
        """
        if len(text) > _CANONICAL_CHARS and self.fallback is not None:
            rest = self.fallback.greedy_tokenize(text[_CANONICAL_CHARS:])
            return [*self(text[:_CANONICAL_CHARS]), *rest]
        wanted = text.encode()
        ids = self._tokenizer.encode(text, add_special=False)
        if self._bytes(ids) == wanted:
            return ids
        # SentencePiece puts a space before a text, which may melt into its first token.
        ids = self._tokenizer.encode(_SENTINEL + text, add_special=False)
        for start in range(min(4, len(ids)) + 1):
            if self._bytes(ids[:start]).endswith(_SENTINEL.encode()) and self._bytes(ids[start:]) == wanted:
                return ids[start:]
        # A normaliser changed the text: the longest tokens that spell it will do.
        return [] if self.fallback is None else list(self.fallback.greedy_tokenize(text))

    def _bytes(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[i] if i < len(self.tokens) else b"" for i in ids)


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """What all grammars of a model share.

    size: width of the model's head. tokens: the bytes of each. encode: ids of a text in the middle of another one.
    solid: of each token, the first byte that is not white space (int16 [size]); BLANK if there is none, END for those
    that end a text or are control tokens.
    """

    guidance: llguidance.LLTokenizer
    size: int
    eos_token_ids: frozenset[int]
    tokens: list[bytes]
    encode: Callable[[str], list[int]]
    solid: npt.NDArray[np.int16]

    BLANK, END = -1, -2


def build_vocabulary(tokenizer: Tokenizer, size: int, eos_token_ids: frozenset[int]) -> GrammarVocabulary:
    """Takes about 0.6 s for 150,000 tokens and 1 s for 260,000 (one core of an EPYC): build it when it is needed.

    size: width of the model's head. With no end token the vocabulary has one more token, which stands for the end.
    """
    ends = frozenset(i for i in eos_token_ids if i < size)
    wrapper = _Vocabulary(tokenizer, size, min(ends, default=None))
    wrapper.special_token_ids = sorted({*wrapper.special_token_ids, *(i for i in ends if wrapper.tokens[i])})
    # Its stub wants a subclass of its own wrapper; the attributes of ours are all that it looks at.
    guidance = llguidance.LLTokenizer(wrapper, eos_token=sorted(ends) or None)  # type: ignore[arg-type]
    wrapper.fallback = guidance
    solid = np.full(size, GrammarVocabulary.BLANK, np.int16)
    for i, token in enumerate(wrapper.tokens):
        if found := token.lstrip(WHITE_SPACE):
            solid[i] = found[0]
    solid[[*wrapper.special_token_ids, *ends]] = GrammarVocabulary.END
    return GrammarVocabulary(guidance, size, ends, wrapper.tokens, wrapper, solid)
