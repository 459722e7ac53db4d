"""A tokenizer from a Hugging Face `tokenizer.json`, which the `tokenizers` library runs."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.core.errors import TokenizerError
from nybble.tokenizer import byte_level
from nybble.tokenizer.named_tokens import NamedTokens
from nybble.tokenizer.tokenizer import Affixes, Tokenizer, Vocabulary

if TYPE_CHECKING:
    import tokenizers

_SPACE = "\u2581"


def build(path: Path, config: Mapping[str, object]) -> Tokenizer:
    """Raises TokenizerError if the file is missing or damaged."""
    import tokenizers

    try:
        text = path.read_text("utf-8")
        described = json.loads(text)
        backend = tokenizers.Tokenizer.from_str(text)
    except FileNotFoundError:
        raise TokenizerError(f"{path} does not exist: a model folder needs its tokenizer.json") from None
    except Exception as e:  # the library raises bare Exception
        raise TokenizerError(f"{path} is not a usable tokenizer.json: {e}") from e
    backend.no_truncation()
    backend.no_padding()
    added = backend.get_added_tokens_decoder()
    size = max((*backend.get_vocab(with_added_tokens=True).values(), -1)) + 1
    decoders = _decoder_types(described.get("decoder"))
    byte_level_vocab = "ByteLevel" in decoders

    def token_bytes(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id].content.encode("utf-8", "replace")
        piece = backend.id_to_token(token_id)
        if piece is None:
            return b""  # a hole in the vocabulary
        if byte_level_vocab:
            return byte_level.to_bytes(piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") and "ByteFallback" in decoders:
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode("utf-8", "replace")

    def id_of(key: str) -> int | None:
        name = config.get(key)
        if isinstance(name, Mapping):
            name = name.get("content")
        return backend.token_to_id(name) if isinstance(name, str) else None

    eos = id_of("eos_token")
    vocabulary = Vocabulary(
        size=size,
        token_bytes=token_bytes,
        control=frozenset(i for i, token in added.items() if token.special),
        eos_token_ids=() if eos is None else (eos,),
        bos_token_id=id_of("bos_token"),
        strip_space="Strip" in decoders,
    )
    return Tokenizer(FileEncoder(backend), vocabulary, _affixes(backend))


class FileEncoder:
    """Encodes with the library.

    It can take all control tokens for text or none. For single ones, each control token also gets a secret name that
    nobody can have written, and that the library finds however the others are taken.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._lock = threading.Lock()  # whether control tokens are recognised is a switch of the backend
        self._control = {i: token for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.names = NamedTokens({}, {token.content: i for i, token in self._control.items()})
        self._secret_names: dict[int, str] = {}
        self._id_of_secret: dict[int, int] = {}

    def encode(self, text: str, *, parse_special: bool, literal: Sequence[int] = ()) -> list[int]:
        with self._lock:
            if parse_special and literal:
                text = self._with_secret_names(text, literal)
            self._backend.encode_special_tokens = bool(literal) or not parse_special
            token_ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self._id_of_secret.get(token_id, token_id) for token_id in token_ids]

    def _with_secret_names(self, text: str, literal: Sequence[int]) -> str:
        if not self._secret_names:
            self._add_secret_names()
        parts, at = [], 0
        for begin, end, token_id in self.names.find(text, control=True, literal=literal):
            parts += [text[at:begin], self._secret_names[token_id]]
            at = end
        return "".join([*parts, text[at:]])

    def _add_secret_names(self) -> None:
        import tokenizers

        secret = secrets.token_hex(16)
        self._secret_names = {i: f"<{secret}:{i}>" for i in self._control}
        self._backend.add_tokens(
            [
                tokenizers.AddedToken(
                    name,
                    lstrip=self._control[i].lstrip,
                    rstrip=self._control[i].rstrip,
                    single_word=self._control[i].single_word,
                    normalized=False,
                )
                for i, name in self._secret_names.items()
            ]
        )
        for i, name in self._secret_names.items():
            token_id = self._backend.token_to_id(name)
            if token_id is None:
                raise TokenizerError(f"the tokenizer does not take a second name for {self._control[i].content!r}")
            self._id_of_secret[token_id] = i


def _affixes(backend: tokenizers.Tokenizer) -> Affixes:
    """What the post-processor puts around a text."""
    encoding = backend.encode("x", add_special_tokens=True)
    marked = list(zip(encoding.ids, encoding.special_tokens_mask, strict=True))
    prefix = [token_id for token_id, special in takewhile(lambda pair: pair[1], marked)]
    suffix = [token_id for token_id, special in takewhile(lambda pair: pair[1], reversed(marked[len(prefix) :]))]
    return Affixes(tuple(prefix), tuple(reversed(suffix)))


def _decoder_types(decoder: object) -> frozenset[str]:
    if not isinstance(decoder, dict):
        return frozenset()
    nested = decoder.get("decoders", [])
    parts = nested if isinstance(nested, list) else []
    return frozenset(str(part.get("type")) for part in (decoder, *parts) if isinstance(part, dict))
