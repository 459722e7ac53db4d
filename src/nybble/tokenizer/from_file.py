"""A tokenizer from a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from nybble.core.errors import TokenizerError
from nybble.tokenizer import byte_level
from nybble.tokenizer.tokenizer import Tokenizer, Vocabulary

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
    return Tokenizer(backend, vocabulary, None)


def _decoder_types(decoder: object) -> frozenset[str]:
    if not isinstance(decoder, dict):
        return frozenset()
    nested = decoder.get("decoders", [])
    parts = nested if isinstance(nested, list) else []
    return frozenset(str(part.get("type")) for part in (decoder, *parts) if isinstance(part, dict))
