"""One class for every tokenizer. It does not know files or GGUF."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nybble.core.errors import TokenizerError
from nybble.tokenizer.detokenizer import Detokenizer
from nybble.tokenizer.named_tokens import NamedTokens


class Encoder(Protocol):
    """Text to the ids that stand for it, nothing added. Called from several threads."""

    @property
    def names(self) -> NamedTokens:
        """The tokens that a text can call by name."""

    def encode(self, text: str, *, parse_special: bool, literal: Sequence[int] = ()) -> list[int]:
        """literal: positions in ascending order that are never part of a control token's name."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the text of single tokens needs.

    size: number of ids. token_bytes: id -> its bytes (control tokens: their name). control: ids that are not text.
    eos_token_ids: ids that end an answer. strip_space: text starts with a space that was not written.
    """

    size: int
    token_bytes: Callable[[int], bytes]
    control: frozenset[int]
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    strip_space: bool = False


@dataclass(frozen=True, slots=True)
class Affixes:
    """Ids put around a text when special tokens are asked for."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


class Tokenizer:
    """Encodes and decodes; safe to use from several threads."""

    def __init__(self, encoder: Encoder, vocabulary: Vocabulary, affixes: Affixes) -> None:
        self._encoder = encoder
        self._vocabulary = vocabulary
        self._affixes = affixes

    @property
    def names(self) -> NamedTokens:
        """The tokens that a text can call by name."""
        return self._encoder.names

    @property
    def vocab_size(self) -> int:
        return self._vocabulary.size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._vocabulary.eos_token_ids

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Control tokens: ids that are not text."""
        return self._vocabulary.control

    @property
    def bos_token_id(self) -> int | None:
        return self._vocabulary.bos_token_id

    @property
    def bos_token(self) -> str | None:
        return None if self.bos_token_id is None else self.token_bytes(self.bos_token_id).decode("utf-8", "replace")

    @property
    def eos_token(self) -> str | None:
        return self.token_bytes(self.eos_token_ids[0]).decode("utf-8", "replace") if self.eos_token_ids else None

    def encode(
        self, text: str, *, add_special: bool, parse_special: bool = False, literal: Sequence[int] = ()
    ) -> list[int]:
        """Token ids of `text`. Control tokens written in the text count as text unless `parse_special`.

        literal: positions in the text, in ascending order; a control token that covers one counts as text all the same.

        Raises TokenizerError if the text is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise TokenizerError(
                "the text holds a lone surrogate: it is not valid Unicode and cannot be encoded"
            ) from e
        token_ids = self._encoder.encode(text, parse_special=parse_special, literal=literal)
        return [*self._affixes.prefix, *token_ids, *self._affixes.suffix] if add_special else token_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token stands for; for a control token its name. Raises TokenizerError if there is none."""
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"token id {token_id} is not in the vocabulary of {self.vocab_size} tokens")
        return self._vocabulary.token_bytes(token_id)

    def stream(self, *, skip_special: bool = True) -> Detokenizer:
        """A detokenizer for one new sequence."""
        vocabulary = self._vocabulary

        def shown(token_id: int) -> bytes:
            if token_id >= vocabulary.size or (skip_special and token_id in vocabulary.control):
                return b""  # a model's head may be padded past the vocabulary
            return vocabulary.token_bytes(token_id)

        return Detokenizer(shown, strip_space=vocabulary.strip_space)

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The whole text: the same as streaming it."""
        detokenizer = self.stream(skip_special=skip_special)
        return "".join([detokenizer.push(token_id) for token_id in token_ids]) + detokenizer.flush()


def check_vocab(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises TokenizerError if the tokenizer can give ids that the model has no embedding for."""
    if tokenizer.vocab_size > model_vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {model_vocab_size}: "
            "they do not belong together, use the tokenizer that came with the model"
        )
