"""The tokenizer of a model folder as keys of a GGUF file.

GGUF files name the way in which text is cut into words, and readers have to know the name. So a name is chosen by
trying: one whose rules cut a text full of oddities as the folder's `tokenizer.json` does. Afterwards the tokenizer is
built from the new keys alone and must give the same tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nybble.checkpoint import Checkpoint
from nybble.core.errors import TokenizerError
from nybble.core.tokenizer_source import GgufTokenizer, TokenizerFile
from nybble.formats.gguf_writer import Value
from nybble.tokenizer import load_tokenizer
from nybble.tokenizer.pretokenizers import pre_tokenizer

if TYPE_CHECKING:
    import tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Names to try, the likelier first; some cut alike and differ in whether a word that is a token stays whole.
_PRE_NAMES = ("llama-bpe", "dbrx", "qwen2", "smollm", "gpt-2", "tekken")
_SPACE = "\u2581"
_PROBE = (
    "Hello World! It's HERE'S we'll  three   spaces\ttab\n\nlines \r\n 1234567 3.14 x=y+42;\u00a0caf\u00e9 na\u00efve "
    "\u4f60\u597d\uff0c\u4e16\u754c \u043f\u0440\u0438\u0432\u0435\u0442 \u0e44\u0e17\u0e22 a\u0301 "
    "\U0001f600\U0001f44d\U0001f3fd /path/to/file http://a.b/c?d=e#f  --flag=\"v\" 'quoted' (a)[b]{c} \u00bd\u00b2 "
    "\u2163 camelCaseWord ABCdef \n \n x"
)


def tokenizer_keys(checkpoint: Checkpoint) -> dict[str, Value]:
    """Raises TokenizerError if GGUF has no name for the tokenizer or would give other tokens."""
    source = checkpoint.tokenizer
    assert isinstance(source, TokenizerFile)
    where = str(source.path)
    reference = load_tokenizer(source)  # reads and checks the file
    described = json.loads(source.path.read_text("utf-8"))
    model = described["model"]
    if model.get("type", "BPE") != "BPE":
        raise TokenizerError(f"{where}: tokenizers of the kind {model.get('type')!r} cannot be written to a GGUF file")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    size = max(checkpoint.spec.vocab_size, reference.vocab_size)
    pieces, types = _tokens(described, size)
    keys: dict[str, Value] = {}
    if model.get("byte_fallback"):
        keys["tokenizer.ggml.model"] = "llama"
        keys["tokenizer.ggml.pre"] = "default"
        keys["tokenizer.ggml.scores"] = _scores(pieces, types, merges)
        keys["tokenizer.ggml.add_space_prefix"] = _adds_space(described)
        unknown = model.get("unk_token")
        if unknown in pieces:
            keys["tokenizer.ggml.unknown_token_id"] = pieces.index(unknown)
            types[pieces.index(unknown)] = _UNKNOWN
    else:
        keys["tokenizer.ggml.model"] = "gpt2"
        keys["tokenizer.ggml.pre"] = _pre_name(described, source)
        keys["tokenizer.ggml.merges"] = merges
    keys["tokenizer.ggml.tokens"] = pieces
    keys["tokenizer.ggml.token_type"] = np.array(types, np.int32)
    keys |= _special(checkpoint, source.config, pieces)
    with_affixes, bare = (reference.encode("x", add_special=on) for on in (True, False))
    bos = keys.get("tokenizer.ggml.bos_token_id")
    keys["tokenizer.ggml.add_bos_token"] = len(with_affixes) > len(bare) and with_affixes[0] == bos
    keys["tokenizer.ggml.add_eos_token"] = len(with_affixes) > len(bare) and with_affixes[-1] == keys.get(
        "tokenizer.ggml.eos_token_id"
    )
    _check(keys, reference.encode(_PROBE, add_special=True), where)
    if checkpoint.chat_template is not None:
        keys["tokenizer.chat_template"] = checkpoint.chat_template
    return keys


def _tokens(described: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Pieces and types by id; ids that the tokenizer does not use get names nobody writes."""
    pieces, types = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size
    for piece, token_id in described["model"]["vocab"].items():
        pieces[token_id], types[token_id] = piece, _NORMAL
        if described["model"].get("byte_fallback") and _BYTE_PIECE.fullmatch(piece):
            types[token_id] = _BYTE
    for token in described.get("added_tokens", ()):
        text = token["content"]
        if described["model"].get("byte_fallback") and not token["special"]:
            text = text.replace(_SPACE, " ")  # readers look for these in the text as it was written
        pieces[token["id"]] = text
        types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    return pieces, types


def _scores(pieces: list[str], types: list[int], merges: list[str]) -> Any:
    """Pieces are merged by score in GGUF and by rank in tokenizer.json: the first merge that gives a piece decides."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    last = float(len(merges))
    scores = [-float(ranks.get(piece, last)) for piece in pieces]
    return np.array(
        [0.0 if kind in (_BYTE, _UNKNOWN) else s for s, kind in zip(scores, types, strict=True)], np.float32
    )


def _adds_space(described: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text: by the normalizer, or by the way in which words are cut."""
    parts = [described.get("normalizer"), described.get("pre_tokenizer")]
    for part in [part for part in parts if part]:
        for step in part.get("normalizers", part.get("pretokenizers", [part])):
            if step["type"] == "Prepend" and step["prepend"] == _SPACE:
                return True
            if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                return bool(step.get("add_prefix_space", True))
    return False


def _pre_name(described: Mapping[str, Any], source: TokenizerFile) -> str:
    backend = _backend(source)
    cutter = backend.pre_tokenizer
    if cutter is None:
        raise TokenizerError(f"{source.path} has no pre_tokenizer: GGUF has no name for that")
    words = [word for word, _ in cutter.pre_tokenize_str(_PROBE)]
    whole = bool(described["model"].get("ignore_merges"))
    for name in _PRE_NAMES:
        candidate = pre_tokenizer(name)
        if candidate.whole_words == whole and [w for w, _ in candidate.build().pre_tokenize_str(_PROBE)] == words:
            return name
    raise TokenizerError(
        f"{source.path} cuts text into words in a way that has no name among those that nybble knows "
        f"({', '.join(_PRE_NAMES)}): convert it with llama.cpp's convert_hf_to_gguf.py"
    )


def _backend(source: TokenizerFile) -> tokenizers.Tokenizer:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(source.path))


def _special(checkpoint: Checkpoint, config: Mapping[str, object], pieces: list[str]) -> dict[str, Value]:
    def named(key: str) -> int | None:
        token = config.get(key)
        text = token.get("content") if isinstance(token, Mapping) else token
        return pieces.index(text) if isinstance(text, str) and text in pieces else None

    ends = list(checkpoint.eos_token_ids)
    own = named("eos_token")
    if own is not None:
        ends = [own, *(i for i in ends if i != own)]
    ends = [i for i in ends if i < len(pieces)]
    keys: dict[str, int | None] = {"bos": checkpoint.bos_token_id, "eos": ends[0] if ends else None}
    if named("bos_token") is not None:
        keys["bos"] = named("bos_token")
    for i in ends[1:]:  # other tokens that end a turn
        keys.setdefault("eom" if pieces[i] == "<|eom_id|>" else "eot", i)
    keys["padding"] = named("pad_token")
    return {f"tokenizer.ggml.{key}_token_id": value for key, value in keys.items() if value is not None}


def _check(keys: Mapping[str, Value], expected: list[int], where: str) -> None:
    plain = {
        key: value.tolist() if isinstance(value, np.ndarray) and key.endswith("token_type") else value
        for key, value in keys.items()
    }
    rebuilt = load_tokenizer(GgufTokenizer(cast("Mapping[str, object]", plain)))
    if rebuilt.encode(_PROBE, add_special=True) != expected:
        raise TokenizerError(
            f"{where}: the tokenizer of the GGUF file would give other tokens than the folder's: "
            "convert it with llama.cpp's convert_hf_to_gguf.py"
        )
