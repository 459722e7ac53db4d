"""Rebuilds a tokenizer from the metadata of a GGUF file.

Keys and token types: the GGUF specification of ggml. SentencePiece merges by score: Kudo and Richardson 2018
(arXiv 1808.06226); the merges of its BPE are not stored and follow from the scores of the merged pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from nybble.core.errors import TokenizerError
from nybble.tokenizer import byte_level
from nybble.tokenizer.pretokenizers import pre_tokenizer
from nybble.tokenizer.tokenizer import Affixes, Tokenizer, Vocabulary

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import models

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6
_SPACE = "\u2581"  # how SentencePiece writes a space
# Control tokens that end a turn; files often name only one of them as end of sequence.
_END_NAMES = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")
)


class _Metadata:
    """Typed, checked reads of the `tokenizer.ggml.*` keys."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        self._metadata = metadata
        self.tokens = self.strings("tokens")
        if not self.tokens:
            raise TokenizerError("the file has no tokenizer.ggml.tokens: it carries no tokenizer, get a complete file")
        self.types = self._per_token("token_type", 1)

    def get(self, key: str, default: object = None) -> object:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def strings(self, key: str) -> list[str]:
        values = self.get(key)
        if values is None:
            return []
        items = list(cast("Sequence[object]", values)) if isinstance(values, Sequence) else [None]
        if any(type(item) is not str for item in items):
            raise TokenizerError(f"tokenizer.ggml.{key} is not a list of strings: the file is damaged")
        return cast("list[str]", items)

    def _per_token(self, key: str, default: float) -> list[float]:
        values = self.get(key)
        if values is None:
            return [default] * len(self.tokens)
        numbers = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(numbers, list | tuple) or len(numbers) != len(self.tokens):
            raise TokenizerError(f"tokenizer.ggml.{key} does not have one entry per token: the file is damaged")
        if not all(isinstance(number, int | float) for number in numbers):
            raise TokenizerError(f"tokenizer.ggml.{key} is not a list of numbers: the file is damaged")
        return list(numbers)

    def scores(self) -> list[float]:
        if self.get("scores") is None:
            raise TokenizerError(
                "tokenizer.ggml.scores is missing: the tokenizer cannot be rebuilt, get a complete file"
            )
        return self._per_token("scores", 0.0)

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
        return [i for i, t in enumerate(self.types) if t == token_type]

    def vocab(self) -> dict[str, int]:
        """piece -> id, without the ids that stand for nothing."""
        vocab = {piece: i for i, piece in enumerate(self.tokens) if self.types[i] != _UNUSED}
        if len(vocab) != sum(t != _UNUSED for t in self.types):
            counts = Counter(piece for i, piece in enumerate(self.tokens) if self.types[i] != _UNUSED)
            twice = counts.most_common(1)[0][0]
            raise TokenizerError(f"the token {twice!r} stands twice in tokenizer.ggml.tokens: the file is damaged")
        return vocab


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
    import tokenizers

    pre = pre_tokenizer(str(m.get("pre", "default")))
    merges = [tuple(merge.split(" ", 1)) for merge in m.strings("merges")]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise TokenizerError("tokenizer.ggml.merges is missing or not a list of pairs: get a complete file")
    model = _bpe(m, cast("list[tuple[str, str]]", merges), ignore_merges=pre.whole_words)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre.build()
    names = frozenset([*m.of_type(_CONTROL), *m.of_type(_USER_DEFINED)])

    def token_bytes(token_id: int) -> bytes:
        piece = m.tokens[token_id]
        return piece.encode("utf-8", "replace") if token_id in names else byte_level.to_bytes(piece)

    return _finish(m, backend, token_bytes, add_bos=pre.add_bos)


def _sentencepiece(m: _Metadata) -> Tokenizer:
    import tokenizers
    from tokenizers import normalizers

    model = _bpe(m, _merges_by_score(m), byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    prefix = m.flag("add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    raw_bytes = {i: _byte_of(m.tokens[i]) for i in m.of_type(_BYTE)}

    def token_bytes(token_id: int) -> bytes:
        if token_id in raw_bytes:
            return raw_bytes[token_id]
        return m.tokens[token_id].replace(_SPACE, " ").encode("utf-8", "replace")

    return _finish(m, backend, token_bytes, add_bos=True, strip_space=prefix)


def _byte_of(piece: str) -> bytes:
    try:
        return bytes([int(piece.removeprefix("<0x").removesuffix(">"), 16)])
    except ValueError:
        raise TokenizerError(f"the byte token {piece!r} is not of the form <0xNN>: the file is damaged") from None


def _merges_by_score(m: _Metadata) -> list[tuple[str, str]]:
    """Every way to put a piece together from two pieces, the best-scored piece first."""
    scores = m.scores()
    mergeable = {piece for i, piece in enumerate(m.tokens) if m.types[i] not in (_CONTROL, _UNUSED, _BYTE, _UNKNOWN)}
    order = sorted((i for i, piece in enumerate(m.tokens) if piece in mergeable), key=lambda i: (-scores[i], i))
    merges = []
    for i in order:
        piece = m.tokens[i]
        for cut in range(1, len(piece)):
            if piece[:cut] in mergeable and piece[cut:] in mergeable:
                merges.append((piece[:cut], piece[cut:]))
    return merges


def _bpe(
    m: _Metadata, merges: list[tuple[str, str]], *, byte_fallback: bool = False, ignore_merges: bool = False
) -> models.BPE:
    from tokenizers import models

    unknown = m.token_id("unknown_token_id") if byte_fallback else None
    try:
        return models.BPE(
            vocab=m.vocab(),
            merges=merges,
            unk_token=None if unknown is None else m.tokens[unknown],
            fuse_unk=byte_fallback,
            byte_fallback=byte_fallback,
            ignore_merges=ignore_merges,
        )
    except TokenizerError:
        raise
    except Exception as e:  # the library raises bare Exception
        raise TokenizerError(f"the file's merges do not fit its tokens: {e}") from e


def _finish(
    m: _Metadata,
    backend: tokenizers.Tokenizer,
    token_bytes: Callable[[int], bytes],
    *,
    add_bos: bool,
    strip_space: bool = False,
) -> Tokenizer:
    from tokenizers import AddedToken

    control = m.of_type(_CONTROL)
    backend.add_special_tokens([AddedToken(m.tokens[i], special=True, normalized=False) for i in control])
    backend.add_tokens([AddedToken(m.tokens[i], normalized=False) for i in m.of_type(_USER_DEFINED)])
    bos, eos = m.token_id("bos_token_id"), m.token_id("eos_token_id")
    named = (eos, m.token_id("eot_token_id"), m.token_id("eom_token_id"))
    ends = dict.fromkeys(i for i in named if i is not None)
    ends |= dict.fromkeys(i for i in control if m.tokens[i] in _END_NAMES)
    with_bos, with_eos = m.flag("add_bos_token", add_bos), m.flag("add_eos_token", False)
    return Tokenizer(
        backend,
        Vocabulary(
            size=len(m.tokens),
            token_bytes=token_bytes,
            control=frozenset(control) | frozenset(m.of_type(_UNUSED)),
            eos_token_ids=tuple(ends),
            bos_token_id=bos,
            strip_space=strip_space,
        ),
        Affixes(
            prefix=(bos,) if with_bos and bos is not None else (),
            suffix=(eos,) if with_eos and eos is not None else (),
        ),
    )
