"""tokenizer.json from the keys of a GGUF file: the way back from `nybble.compress.gguf.vocabulary`.

The library's tokenizer is built from the pieces, merges and token types of the file, and is only written if it cuts a
text full of oddities exactly as the file's own tokenizer does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from nybble.core.errors import TokenizerError
from nybble.core.tokenizer_source import GgufTokenizer
from nybble.tokenizer import load_tokenizer
from nybble.tokenizer.pretokenizers import pre_tokenizer

if TYPE_CHECKING:
    import tokenizers

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
_SPACE = "\u2581"
_PROBE = (
    "Hello World! It's HERE'S we'll  three   spaces\ttab\n\nlines \r\n 1234567 3.14 x=y+42;\u00a0caf\u00e9 na\u00efve "
    "\u4f60\u597d\uff0c\u4e16\u754c \u043f\u0440\u0438\u0432\u0435\u0442 a\u0301 \U0001f600\U0001f44d\U0001f3fd "
    "/path/to/file http://a.b/c?d=e#f  --flag=\"v\" 'quoted' (a)[b]{c} \u00bd\u00b2 camelCaseWord ABCdef \n \n x"
)


def tokenizer_json(source: GgufTokenizer) -> str:
    """Raises TokenizerError if the library cannot be made to give the same tokens."""
    keys = source.metadata
    kind = keys.get("tokenizer.ggml.model")
    pieces = [str(piece) for piece in _list(keys, "tokens")]
    types = [int(cast("int", kind)) for kind in _list(keys, "token_type")] or [1] * len(pieces)
    backend = _byte_level(keys, pieces) if kind == "gpt2" else _sentencepiece(keys, pieces, types)
    _add_names(backend, pieces, types)
    _add_affixes(backend, source, pieces)
    reference = load_tokenizer(source)
    for special in (False, True):
        found = backend.encode(_PROBE, add_special_tokens=special).ids
        if found != reference.encode(_PROBE, add_special=special, parse_special=True):
            raise TokenizerError(
                "the tokenizer.json made from the GGUF file's keys would give other tokens than the file: use the "
                "model's own Hugging Face folder as the source"
            )
    return backend.to_str(pretty=True)


def _list(keys: Mapping[str, object], name: str) -> Sequence[object]:
    values = keys.get(f"tokenizer.ggml.{name}")
    return cast("Sequence[object]", values) if values is not None else ()


def _byte_level(keys: Mapping[str, object], pieces: list[str]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    pre = pre_tokenizer(str(keys.get("tokenizer.ggml.pre", "default")))
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [_pair(str(merge)) for merge in _list(keys, "merges")]
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.whole_words)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    return backend


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(keys: Mapping[str, object], pieces: list[str], types: list[int]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {piece: i for i, piece in enumerate(pieces)}
    scores = [float(cast("float", score)) for score in _list(keys, "scores")]
    unknown = keys.get("tokenizer.ggml.unknown_token_id")
    name = pieces[unknown] if isinstance(unknown, int) and unknown < len(pieces) else None
    model = models.BPE(
        vocab=vocab,
        merges=_merges(vocab, pieces, scores, types),
        unk_token=name,
        fuse_unk=True,
        byte_fallback=True,
    )
    prefix = bool(keys.get("tokenizer.ggml.add_space_prefix", True))
    backend = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    after: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.insert(0, normalizers.Prepend(_SPACE))
        after.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(after)
    return backend


def _merges(
    vocab: Mapping[str, int], pieces: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """SentencePiece merges whichever two neighbours give the piece with the best score: as a list of pairs."""
    found: list[tuple[float, int, int, str, str]] = []
    usable = [kind not in (_CONTROL, _USER_DEFINED, _BYTE) for kind in types]
    for i, piece in enumerate(pieces):
        if not usable[i]:
            continue
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None and usable[left] and usable[right]:
                found.append((-scores[i], left, right, piece[:cut], piece[cut:]))
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for _, _, _, left, right in found]


def _add_names(backend: tokenizers.Tokenizer, pieces: list[str], types: list[int]) -> None:
    """Tokens that a text calls by name, in the order of their ids, so that they keep them."""
    from tokenizers import AddedToken

    for i, piece in enumerate(pieces):
        if types[i] in (_CONTROL, _USER_DEFINED):
            content = piece.replace(_SPACE, " ") if types[i] == _USER_DEFINED and backend.normalizer else piece
            if backend.token_to_id(piece) == i:
                content = piece
            backend.add_tokens([AddedToken(content, special=types[i] == _CONTROL, normalized=False)])
            if backend.token_to_id(content) != i:
                raise TokenizerError(
                    f"the token {piece!r} has the id {i} in the GGUF file, which a tokenizer.json cannot give it: use "
                    "the model's own Hugging Face folder as the source"
                )


def _add_affixes(backend: tokenizers.Tokenizer, source: GgufTokenizer, pieces: list[str]) -> None:
    from tokenizers import processors

    reference = load_tokenizer(source)
    bare, whole = (reference.encode("x", add_special=special) for special in (False, True))
    if len(whole) == len(bare):
        return
    begin = 0
    while whole[begin : begin + len(bare)] != bare:
        begin += 1
    before, after = whole[:begin], whole[begin + len(bare) :]
    names = [pieces[i] for i in before], [pieces[i] for i in after]
    backend.post_processor = processors.TemplateProcessing(
        single=[*names[0], "$A", *names[1]],
        pair=[*names[0], "$A:0", "$B:1", *names[1]],
        special_tokens=[(pieces[i], i) for i in dict.fromkeys([*before, *after])],
    )
