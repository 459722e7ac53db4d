"""Tokenizers rebuilt from GGUF metadata give the ids of the tokenizers that they describe."""

from __future__ import annotations

import io
import random

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from nybble.core.errors import TokenizerError
from nybble.core.tokenizer_source import GgufTokenizer, TokenizerFile
from nybble.tokenizer import load_tokenizer
from nybble.tokenizer.tokenizer import check_vocab

pytestmark = pytest.mark.unit
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "She sells sea shells; he'll sell 12 or 345 of them, won't he?",
    "Größe, naïve café, 日本語のテキスト, привет мир!",
    "def f(x):\n    return x ** 2\n\n\n# done",
] * 8
TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "   leading and   runs  of spaces ",
    "tabs\tand\r\nCRLF\n\n\n",
    "😀👨‍👩‍👧 e\u0301 \u200b\ufeff\u00a0",
    "1234567890 ١٢٣ ½",
    "nul\x00byte",
    "DON'T I'm we'LL",
    "<|end|> is text here",
]
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@pytest.fixture(scope="module")
def byte_level():
    """A small GPT-2-like tokenizer and its description in GGUF's keys."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    import json

    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return backend, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL, CONTROL, *[NORMAL] * (len(tokens) - 2)],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


@pytest.fixture(scope="module")
def sentence_piece():
    """A small SentencePiece BPE with byte fallback and its description in GGUF's keys."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<turn>"],
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

    def kind(i):
        if sp.is_byte(i):
            return 6
        if sp.is_unknown(i):
            return 2
        if sp.is_control(i):
            return CONTROL
        return USER_DEFINED if sp.id_to_piece(i) == "<turn>" else NORMAL

    ids = range(sp.vocab_size())
    return sp, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [sp.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": sp.bos_id(),
        "tokenizer.ggml.eos_token_id": sp.eos_id(),
        "tokenizer.ggml.unknown_token_id": sp.unk_id(),
        "tokenizer.ggml.add_space_prefix": True,
    }


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_ids_and_text(byte_level, text):
    backend, metadata = byte_level
    tokenizer = load_tokenizer(GgufTokenizer(metadata))
    backend.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special=False)
    assert ids == backend.encode(text).ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_ids_and_text(sentence_piece, text):
    sp, metadata = sentence_piece
    tokenizer = load_tokenizer(GgufTokenizer(metadata))
    ids = tokenizer.encode(text, add_special=False)
    assert ids == sp.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, add_special=True) == [sp.bos_id(), *ids]


def test_sentencepiece_with_pieces_across_spaces_and_unused_ones(sentence_piece):
    """Both are rare, and both decide how a text may be cut and put together."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    sp, metadata = sentence_piece
    model = proto.ModelProto.FromString(sp.serialized_model_proto())
    names = [piece.piece for piece in model.pieces]
    for i, name in enumerate(("l\u2581", "l\u2581s", ".\u2581S")):
        model.pieces.add(piece=name, score=-0.5 - i)
    for name in ("he", "ea", "fox", "\u2581s", "in"):
        if name in names:
            model.pieces[names.index(name)].type = UNUSED
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    tokenizer = load_tokenizer(
        GgufTokenizer(
            metadata
            | {
                "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
                "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
                "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
            }
        )
    )
    draw = random.Random(3)
    words = [*" ".join(CORPUS[:4]).split(), "sell", "hell", "shell  s", "l", " ", "<turn>", "he.", "foxes"]
    for text in [*TEXTS, *(" ".join(draw.choices(words, k=30)) for _ in range(200))]:
        assert tokenizer.encode(text.replace("<turn>", "-"), add_special=False) == sp.encode(
            text.replace("<turn>", "-")
        )


def test_long_texts_and_texts_seen_before(byte_level, sentence_piece):
    backend, metadata = byte_level
    backend.encode_special_tokens = True
    tokenizer = load_tokenizer(GgufTokenizer(metadata))
    pieces = load_tokenizer(GgufTokenizer(sentence_piece[1]))
    for text in ("lazydog" * 3000, " ".join(CORPUS) * 20, "日本語" * 500):
        for _ in range(2):
            assert tokenizer.encode(text, add_special=False) == backend.encode(text).ids
            assert pieces.encode(text, add_special=False) == sentence_piece[0].encode(text)


def test_unused_tokens_may_repeat_others(byte_level):
    metadata = dict(byte_level[1])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "a", "[PAD]", "[PAD]"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], UNUSED, UNUSED, UNUSED]
    tokenizer = load_tokenizer(GgufTokenizer(metadata))
    assert tokenizer.encode("a", add_special=False) == [metadata["tokenizer.ggml.tokens"].index("a")]
    assert max(tokenizer.encode("[PAD]", add_special=False, parse_special=True)) < tokenizer.vocab_size - 3


def test_user_defined_tokens_always_match_and_control_tokens_only_when_asked(byte_level, sentence_piece):
    sp, metadata = sentence_piece
    turn = sp.piece_to_id("<turn>")
    assert turn in load_tokenizer(GgufTokenizer(metadata)).encode("a<turn>b", add_special=False)
    tokenizer = load_tokenizer(GgufTokenizer(byte_level[1]))
    assert 1 not in tokenizer.encode("x<|end|>", add_special=False)
    assert tokenizer.encode("x<|end|>", add_special=False, parse_special=True)[-1] == 1
    assert tokenizer.eos_token_ids == (1,)


def test_tokenizer_json_gives_the_same(byte_level, tmp_path):
    backend, metadata = byte_level
    backend.save(str(tmp_path / "tokenizer.json"))
    from_file = load_tokenizer(TokenizerFile(tmp_path / "tokenizer.json", {"eos_token": {"content": "<|end|>"}}))
    from_gguf = load_tokenizer(GgufTokenizer(metadata))
    assert from_file.eos_token_ids == from_gguf.eos_token_ids == (1,)
    assert from_file.vocab_size == from_gguf.vocab_size
    for text in TEXTS:
        ids = from_gguf.encode(text, add_special=False)
        assert from_file.encode(text, add_special=False) == ids
        assert from_file.decode(ids) == text


def test_a_stream_never_shows_half_a_character(byte_level):
    tokenizer = load_tokenizer(GgufTokenizer(byte_level[1]))
    text = "😀 日本語 é"
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in tokenizer.encode(text, add_special=False)]
    assert "\ufffd" not in "".join(parts) and "".join(parts) + stream.flush() == text
    cut = tokenizer.stream()
    shown = "".join(cut.push(i) for i in tokenizer.encode("😀", add_special=False)[:-1])
    assert shown == "" and cut.flush() == "\ufffd"


def test_control_tokens_and_padding_are_not_shown(byte_level):
    tokenizer = load_tokenizer(GgufTokenizer(byte_level[1]))
    ids = tokenizer.encode("hi", add_special=False)
    assert tokenizer.decode([0, *ids, 1, 10**6]) == "hi"
    assert tokenizer.decode([0, *ids], skip_special=False) == "<s>hi"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "'rwkv', which is not supported"),
        ({"tokenizer.ggml.pre": "martian"}, "'martian', which is not supported"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "not a list of strings"),
        ({"tokenizer.ggml.merges": []}, "merges is missing"),
        ({"tokenizer.ggml.merges": ["abc"]}, "not a list of pairs"),
        ({"tokenizer.ggml.merges": ["zzzz qqqq"]}, "do not fit"),
        ({"tokenizer.ggml.token_type": [1]}, "one entry per token"),
        ({"tokenizer.ggml.eos_token_id": 10**9}, "outside"),
        ({"tokenizer.ggml.bos_token_id": "x"}, "outside"),
    ],
)
def test_a_damaged_description_is_refused(byte_level, change, message):
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(GgufTokenizer(byte_level[1] | change))


def test_duplicate_tokens_are_refused(byte_level):
    metadata = dict(byte_level[1])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:-1], "a"]
    with pytest.raises(TokenizerError, match="stands twice"):
        load_tokenizer(GgufTokenizer(metadata))


def test_lone_surrogates_and_a_model_that_is_too_small(byte_level):
    tokenizer = load_tokenizer(GgufTokenizer(byte_level[1]))
    with pytest.raises(TokenizerError, match="surrogate"):
        tokenizer.encode("\ud800", add_special=False)
    with pytest.raises(TokenizerError, match="do not belong together"):
        check_vocab(tokenizer, 10)


def test_a_damaged_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="does not exist"):
        load_tokenizer(TokenizerFile(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="not a usable"):
        load_tokenizer(TokenizerFile(tmp_path / "tokenizer.json"))
