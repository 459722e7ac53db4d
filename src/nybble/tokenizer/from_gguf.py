"""Rebuilds a tokenizer from the metadata of a GGUF file.

Keys and token types: the GGUF specification of ggml. SentencePiece merges by score: Kudo and Richardson 2018
(arXiv 1808.06226). A token is control if the file says so, never by its name: `</s>` is a strike-through tag in Gemma 3
and three ordinary tokens in Qwen 2.5, though llama.cpp takes it for the end of a text in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from nybble.core.errors import TokenizerError
from nybble.tokenizer import byte_level
from nybble.tokenizer.named_tokens import NamedTokens
from nybble.tokenizer.piece_encoder import (
    SPACE,
    BeforeSpaces,
    PieceEncoder,
    byte_level_words,
    scored_split,
    scored_words,
)
from nybble.tokenizer.pretokenizers import pre_tokenizer
from nybble.tokenizer.string_index import StringIndex
from nybble.tokenizer.tokenizer import Affixes, Tokenizer, Vocabulary

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
# Control tokens that end a turn; files often name only one of them as end of sequence.
_END_NAMES = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>",
)  # fmt: skip


class _Metadata:
    """Typed, checked reads of the `tokenizer.ggml.*` keys."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata
        self.tokens = self.strings("tokens")
        if not len(self.tokens):
            raise TokenizerError("the file has no tokenizer.ggml.tokens: it carries no tokenizer, get a complete file")
        self._types = self._per_token("token_type", 1)

    def get(self, key: str, default: object = None) -> object:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def strings(self, key: str) -> Sequence[str]:
        """As they lie in the file: each look-up makes a string."""
        values = self.get(key)
        if values is None:
            return ()
        if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values[:1]):
            raise TokenizerError(f"tokenizer.ggml.{key} is not a list of strings: the file is damaged")
        return cast("Sequence[str]", values)

    def _per_token(self, key: str, default: float) -> npt.NDArray[Any]:
        values = self.get(key)
        if values is None:
            return np.full(len(self.tokens), default)
        try:
            numbers = np.asarray(values)
        except ValueError:  # lists of different lengths
            numbers = np.empty(0)
        if numbers.shape != (len(self.tokens),):
            raise TokenizerError(f"tokenizer.ggml.{key} does not have one entry per token: the file is damaged")
        if numbers.dtype.kind not in "iufb":
            raise TokenizerError(f"tokenizer.ggml.{key} is not a list of numbers: the file is damaged")
        return numbers

    def scores(self) -> memoryview:
        if self.get("scores") is None:
            raise TokenizerError(
                "tokenizer.ggml.scores is missing: the tokenizer cannot be rebuilt, get a complete file"
            )
        return np.ascontiguousarray(self._per_token("scores", 0.0), np.float64).data

    def token_id(self, key: str) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise TokenizerError(
                f"tokenizer.ggml.{key} is {value!r}, outside the {len(self.tokens)} tokens of the file"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.get(key, default))

    def of_type(self, token_type: int) -> list[int]:
        return np.flatnonzero(self._types == token_type).tolist()

    def named(self, *token_types: int) -> dict[str, int]:
        """name -> id of the tokens of some types."""
        return {self.tokens[i]: i for token_type in token_types for i in self.of_type(token_type)}

    def vocab(self, *without: int, visit: Callable[[list[str]], None] | None = None) -> StringIndex:
        """piece -> id, without the tokens of some types."""
        left_out = [i for token_type in without for i in self.of_type(token_type)]
        unused = self.of_type(_UNUSED)
        return StringIndex(self.tokens, "tokenizer.ggml.tokens", without=left_out, may_repeat=unused, visit=visit)


def build(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that the metadata describes.

    Raises TokenizerError if it is of an unknown kind or its parts do not fit together.
    """
    m = _Metadata(metadata)
    kind = m.get("model")
    if kind == "gpt2":
        return _byte_level_bpe(m)
    if kind == "llama":
        return _sentencepiece(m)
    raise TokenizerError(f"tokenizer.ggml.model is {kind!r}, which is not supported (known: 'gpt2', 'llama')")


def _byte_level_bpe(m: _Metadata) -> Tokenizer:
    pre = pre_tokenizer(str(m.get("pre", "default")))
    vocab = m.vocab(_CONTROL, _USER_DEFINED, _UNUSED)

    def check(merges: list[str]) -> None:
        joined = "\0".join(merges)
        if not all([" " in merge for merge in merges]):
            raise TokenizerError("tokenizer.ggml.merges is not a list of pairs: get a complete file")
        for i in vocab.missing(joined.replace(" ", "").split("\0")):
            raise TokenizerError(f"the file's merges do not fit its tokens: no token is what {merges[i]!r} gives")

    merges = StringIndex(m.strings("merges"), "tokenizer.ggml.merges", visit=check)
    if not len(merges):
        raise TokenizerError("tokenizer.ggml.merges is missing: get a complete file")
    split = pre.build().pre_tokenize_str
    names = frozenset([*m.of_type(_CONTROL), *m.of_type(_USER_DEFINED)])
    tokens = m.tokens

    def token_bytes(token_id: int) -> bytes:
        piece = tokens[token_id]
        return piece.encode("utf-8", "replace") if token_id in names else byte_level.to_bytes(piece)

    encoder = PieceEncoder(
        NamedTokens(m.named(_USER_DEFINED), m.named(_CONTROL, _UNKNOWN)),
        lambda text: [word for word, _ in split(text)],
        byte_level_words(vocab, merges, whole_words=pre.whole_words),
    )
    return _finish(m, encoder, token_bytes, add_bos=pre.add_bos)


def _sentencepiece(m: _Metadata) -> Tokenizer:
    before_spaces = BeforeSpaces()
    vocab = m.vocab(_CONTROL, _UNKNOWN, _BYTE, visit=before_spaces.add)
    prefix = m.flag("add_space_prefix", True)
    tokens = m.tokens
    raw_bytes = {i: _byte_of(tokens[i]) for i in m.of_type(_BYTE)}

    def token_bytes(token_id: int) -> bytes:
        if token_id in raw_bytes:
            return raw_bytes[token_id]
        return tokens[token_id].replace(SPACE, " ").encode("utf-8", "replace")

    words = scored_words(
        vocab,
        m.scores(),
        unused=frozenset(m.of_type(_UNUSED)),
        byte_ids={data[0]: i for i, data in raw_bytes.items()},
        unknown_id=m.token_id("unknown_token_id"),
    )
    names = NamedTokens(m.named(_USER_DEFINED), m.named(_CONTROL, _UNKNOWN))
    encoder = PieceEncoder(names, scored_split(before_spaces, space_prefix=prefix), words)
    return _finish(m, encoder, token_bytes, add_bos=True, strip_space=prefix)


def _byte_of(piece: str) -> bytes:
    try:
        return bytes([int(piece.removeprefix("<0x").removesuffix(">"), 16)])
    except ValueError:
        raise TokenizerError(f"the byte token {piece!r} is not of the form <0xNN>: the file is damaged") from None


def _finish(
    m: _Metadata,
    encoder: PieceEncoder,
    token_bytes: Callable[[int], bytes],
    *,
    add_bos: bool,
    strip_space: bool = False,
) -> Tokenizer:
    control = m.named(_CONTROL)
    bos, eos = m.token_id("bos_token_id"), m.token_id("eos_token_id")
    named = (eos, m.token_id("eot_token_id"), m.token_id("eom_token_id"), *map(control.get, _END_NAMES))
    with_bos, with_eos = m.flag("add_bos_token", add_bos), m.flag("add_eos_token", False)
    return Tokenizer(
        encoder,
        Vocabulary(
            size=len(m.tokens),
            token_bytes=token_bytes,
            control=frozenset([*m.of_type(_CONTROL), *m.of_type(_UNKNOWN), *m.of_type(_UNUSED)]),
            eos_token_ids=tuple(dict.fromkeys(i for i in named if i is not None)),
            bos_token_id=bos,
            strip_space=strip_space,
        ),
        Affixes(
            prefix=(bos,) if with_bos and bos is not None else (),
            suffix=(eos,) if with_eos and eos is not None else (),
        ),
    )
