"""The merging of pairs and what finds pieces and names, against slow and plain versions of themselves."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from nybble.core.errors import TokenizerError
from nybble.tokenizer.merging import merge_pairs
from nybble.tokenizer.named_tokens import NamedTokens
from nybble.tokenizer.string_index import StringIndex

pytestmark = pytest.mark.unit


def test_merges_are_those_of_the_tokenizers_library() -> None:
    draw = random.Random(7)
    for _ in range(60):
        pieces, merges = list("abc"), []
        for _ in range(draw.randrange(1, 25)):
            pair = (draw.choice(pieces), draw.choice(pieces))
            if pair not in merges:
                merges.append(pair)
                pieces += [] if "".join(pair) in pieces else ["".join(pair)]
        ranks = {pair: rank for rank, pair in enumerate(merges)}
        vocab = {piece: i for i, piece in enumerate(pieces)}
        backend = Backend(models.BPE(vocab=vocab, merges=merges))
        for length in (1, 2, 3, 10, 60, 400):
            word = "".join(draw.choices("abc", k=length))
            parts = merge_pairs(word, lambda left, right, ranks=ranks: ranks.get((left, right)))
            assert parts == backend.encode(word).tokens


def test_the_leftmost_of_equals_comes_first() -> None:
    assert merge_pairs("aaaaa", lambda left, right: 0 if left + right == "aa" else None) == ["aa", "aa", "a"]
    assert merge_pairs("", lambda left, right: 0) == []
    assert merge_pairs("a", lambda left, right: 0) == ["a"]
    assert len(merge_pairs("a" * 200_000, lambda left, right: len(left + right))) == 1


def test_an_index_finds_what_is_there() -> None:
    strings = [f"piece {i}" for i in range(50_000)]
    seen: list[str] = []
    index = StringIndex(strings, "the list", without=[3, 49_999], visit=seen.extend)
    assert seen == strings
    assert len(index) == 49_998
    assert all(index.get(string) == i for i, string in enumerate(strings) if i not in (3, 49_999))
    assert [index.get(string) for string in ("piece 3", "piece 49999", "piece", "")] == [None] * 4
    assert list(index.missing(["piece 1", "nothing", "piece 3", "piece 2"])) == [1, 2]
    assert list(StringIndex([], "nothing").missing(["a"])) == [0]


def test_an_index_tells_strings_of_one_hash_apart() -> None:
    class Same(str):
        __slots__ = ()

        def __hash__(self) -> int:
            return 5

        __eq__ = str.__eq__

    # Only in the table: the sequence holds plain strings, as a file's would.
    index = StringIndex(["a", "b"], "the list")
    index._hashes[0] = index._hashes[1] = 5
    assert [index.get(Same(text)) for text in ("a", "b", "c")] == [0, 1, None]


def test_an_index_refuses_twins() -> None:
    with pytest.raises(TokenizerError, match="'b' stands twice in the list"):
        StringIndex(["a", "b", "c", "b"], "the list")
    assert StringIndex(["a", "b", "c", "b"], "the list", without=[1]).get("b") == 3
    assert StringIndex(["a", "b", "c", "b"], "the list", may_repeat=[3]).get("b") == 1
    with pytest.raises(TokenizerError, match="not a list of strings"):
        StringIndex(["a", 1], "the list")


NAMES = NamedTokens({"<b>": 1, "<b><b>": 2, "\n": 3, "\n\n\n": 4}, {"<|end|>": 5, "<b>|": 6, "[X]": 7, "": 8})


@pytest.mark.parametrize(
    ("text", "plain", "with_control"),
    [
        ("", [], []),
        ("none", [], []),
        ("a<b>c", [(1, 4, 1)], [(1, 4, 1)]),
        ("<b><b><b>", [(0, 6, 2), (6, 9, 1)], [(0, 6, 2), (6, 9, 1)]),
        ("\n\n\n\n\n", [(0, 3, 4), (3, 4, 3), (4, 5, 3)], [(0, 3, 4), (3, 4, 3), (4, 5, 3)]),
        ("<b>|", [(0, 3, 1)], [(0, 4, 6)]),
        ("<|end|><|end|", [], [(0, 7, 5)]),
        ("[<|[X]end|>", [], [(3, 6, 7)]),
    ],
)
def test_names_are_found_leftmost_and_longest(
    text: str, plain: list[tuple[int, int, int]], with_control: list[tuple[int, int, int]]
) -> None:
    assert list(NAMES.find(text, control=False)) == plain
    assert list(NAMES.find(text, control=True)) == with_control


def test_a_control_token_that_covers_a_literal_position_is_text() -> None:
    text = "<|end|><|end|>"
    assert list(NAMES.find(text, control=True, literal=[0])) == [(7, 14, 5)]
    assert list(NAMES.find(text, control=True, literal=[6])) == [(7, 14, 5)]
    assert list(NAMES.find(text, control=True, literal=[7])) == [(0, 7, 5)]
    assert list(NAMES.find("<b>|", control=True, literal=[3])) == [(0, 3, 1)]


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        ("", []),
        ("a < b", []),
        ("x<|end|>y", [1]),
        ("<|en<|end|>", [4]),
        ("see <|en", [4]),
        ("<|en \n", [0]),
        ("a[", [1]),
    ],
)
def test_where_control_tokens_begin(text: str, begins: list[int]) -> None:
    assert NAMES.control_begins(text) == begins
