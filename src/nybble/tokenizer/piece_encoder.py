"""Text to token ids with the pieces of a vocabulary, byte-level or SentencePiece.

Both are merged here in Python and not by the `tokenizers` library: its tables take a second to fill and hundreds of
megabytes, and all but a few words of a text have been merged before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache

from nybble.tokenizer.merging import merge_pairs
from nybble.tokenizer.named_tokens import NamedTokens
from nybble.tokenizer.string_index import StringIndex

SPACE = "\u2581"  # how SentencePiece writes a space
_KEPT_WORDS = 1 << 14
_LONGEST_KEPT = 64  # characters; longer words seldom come again

EncodeWord = Callable[[str], tuple[int, ...]]


class PieceEncoder:
    """Cuts a text at the tokens that it names, what is between them into words, and encodes each word once."""

    def __init__(self, names: NamedTokens, split: Callable[[str], Sequence[str]], encode_word: EncodeWord) -> None:
        self.names = names
        self._split = split
        self._encode_word = encode_word
        self._encode_short = lru_cache(_KEPT_WORDS)(encode_word)

    def encode(self, text: str, *, parse_special: bool, literal: Sequence[int] = ()) -> list[int]:
        """The ids of a text. literal: positions that are never part of a control token's name."""
        token_ids: list[int] = []
        at = 0
        for begin, end, token_id in self.names.find(text, control=parse_special, literal=literal):
            token_ids += self._encode_text(text[at:begin])
            token_ids.append(token_id)
            at = end
        token_ids += self._encode_text(text[at:])
        return token_ids

    def _encode_text(self, text: str) -> Iterator[int]:
        if text:
            short, long = self._encode_short, self._encode_word
            for word in self._split(text):
                yield from short(word) if len(word) <= _LONGEST_KEPT else long(word)


def byte_level_words(vocab: StringIndex, merges: StringIndex, *, whole_words: bool) -> EncodeWord:
    """How words of a byte-level vocabulary, in its alphabet of bytes, are encoded.

    merges: "left right", the first comes first. whole_words: a word that is in the vocabulary stays one.
    """

    def rank(left: str, right: str) -> int | None:
        return merges.get(f"{left} {right}")

    def encode_word(word: str) -> tuple[int, ...]:
        if whole_words and (token_id := vocab.get(word)) is not None:
            return (token_id,)
        # A byte that the vocabulary lacks has no id: other tools leave it out too.
        return tuple([i for part in merge_pairs(word, rank) if (i := vocab.get(part)) is not None])

    return encode_word


def scored_words(
    vocab: StringIndex,
    scores: Sequence[float],
    *,
    unused: Collection[int],
    byte_ids: Mapping[int, int],
    unknown_id: int | None,
) -> EncodeWord:
    """How words of a SentencePiece BPE are encoded: two neighbours merge if the vocabulary has what they give.

    unused: pieces that are merged, but taken apart again at the end. byte_ids: byte -> its token, for characters that
    are no piece.
    """

    def encode_word(word: str) -> tuple[int, ...]:
        halves: dict[str, tuple[str, str]] = {}

        def rank(left: str, right: str) -> float | None:
            token_id = vocab.get(left + right)
            if token_id is None:
                return None
            if token_id in unused:
                halves[left + right] = (left, right)
            return -scores[token_id]

        token_ids: list[int] = []
        parts = merge_pairs(word, rank)[::-1]
        while parts:
            part = parts.pop()
            token_id = vocab.get(part)
            if token_id is None:
                token_ids += _bytes_of(part, byte_ids, unknown_id)
            elif token_id in unused and part in halves:
                parts += halves[part][::-1]
            else:
                token_ids.append(token_id)
        return tuple(token_ids)

    return encode_word


def _bytes_of(part: str, byte_ids: Mapping[int, int], unknown_id: int | None) -> list[int]:
    data = part.encode("utf-8")
    if all(byte in byte_ids for byte in data):
        return [byte_ids[byte] for byte in data]
    return [] if unknown_id is None else [unknown_id]


class BeforeSpaces:
    """The characters that stand right before a space in some piece. `add` is told all pieces."""

    def __init__(self) -> None:
        self.characters = {SPACE}

    def add(self, pieces: Sequence[str]) -> None:
        text = "\0".join(pieces)
        found = {part[-1:] for part in text.split(SPACE)[:-1]}
        if text.count("\0") == len(pieces) - 1:  # none of them has a NUL itself
            found.discard("\0")
        self.characters |= found


def scored_split(before_spaces: BeforeSpaces, *, space_prefix: bool) -> Callable[[str], list[str]]:
    """How a text is cut for SentencePiece, which knows no words: before a space that no piece reaches across.

    After a character that no piece has before a space, the space begins a part of its own, whatever is merged first.
    """
    characters = re.escape("".join(sorted(before_spaces.characters)))
    boundary = re.compile(f"(?<=[^{characters}])(?={SPACE})")

    def split(text: str) -> list[str]:
        text = text.replace(" ", SPACE)
        return boundary.split(SPACE + text if space_prefix else text)

    return split
