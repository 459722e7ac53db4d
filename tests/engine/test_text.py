"""Stop strings across the borders of tokens."""

from __future__ import annotations

import itertools

import pytest

from nybble.engine.text import TextStream

pytestmark = pytest.mark.unit


class Pieces:
    """A detokenizer whose tokens are indices into a list of texts."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self._pieces, self._rest = pieces, rest

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return self._rest


def shown(pieces: list[str], stop: tuple[str, ...], rest: str = "") -> tuple[list[str], bool]:
    stream = TextStream(Pieces(pieces, rest), stop)
    texts = [stream.push(index) for index in range(len(pieces))]
    return [*texts, stream.flush()], stream.stopped


def test_without_stop_strings_text_passes_through() -> None:
    assert shown(["a", "", "bc"], (), "d") == (["a", "", "bc", "d"], False)


def test_a_possible_beginning_is_held_back_and_released() -> None:
    assert shown(["one <", "end", "ing"], ("<end>",)) == (["one ", "", "<ending", ""], False)
    assert shown(["one <en"], ("<end>",)) == (["one ", "<en"], False)


def test_the_text_ends_before_the_first_stop_string() -> None:
    assert shown(["one <", "en", "d> two", "three"], ("<end>", " two")) == (["one ", "", "", "", ""], True)


def test_a_stop_string_in_what_is_flushed() -> None:
    assert shown(["a"], ("bc",), "xbcd") == (["a", "x"], True)


def test_no_tokenizer_no_text() -> None:
    stream = TextStream(None, ("x",))
    assert (stream.push(3), stream.flush(), stream.stopped) == ("", "", False)


@pytest.mark.parametrize("text", ["aab", "abab", "aaab", "baab", "bbbb", "aabaab"])
def test_every_cutting_gives_the_same_text(text: str) -> None:
    stop = ("aab",)
    expected = text.split("aab")[0]
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        pieces = [text[0]]
        for cut, character in zip(cuts, text[1:], strict=True):
            if cut:
                pieces.append(character)
            else:
                pieces[-1] += character
        texts, stopped = shown(pieces, stop)
        assert "".join(texts) == expected
        assert stopped == ("aab" in text)
