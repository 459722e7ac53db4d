"""Training text: packed sequences from files, lines of JSON, data sets and the teacher itself."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from nybble.checkpoint import open_checkpoint
from nybble.compress.train.data import Sequences, load_sequences
from nybble.core.errors import ConfigError
from nybble.tokenizer import load_tokenizer

pytestmark = [pytest.mark.unit]


def test_sequences_are_the_text_cut_into_pieces(llama: Path, text: Path) -> None:
    checkpoint = open_checkpoint(llama)
    found = load_sequences(checkpoint, str(text), seq_len=32, tokens=2000)
    whole = load_tokenizer(checkpoint.tokenizer).encode(text.read_text(), add_special=False)
    assert found.token_ids.shape == (2000 // 32, 33) and found.name == "text.txt"
    assert found.token_ids[:, :-1].reshape(-1).tolist() == whole[: 62 * 32]
    assert (found.token_ids[1:, 0] == found.token_ids[:-1, -1]).all()  # each also has what its last position says


def test_documents_end_with_the_end_of_text(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "the lower"}\n\n{"text": "and on", "id": 3}\n"in there"\n' * 20)
    checkpoint = open_checkpoint(llama)
    found = load_sequences(checkpoint, str(path), seq_len=8, tokens=1000)
    tokenizer, end = load_tokenizer(checkpoint.tokenizer), checkpoint.eos_token_ids[0]
    expected = [
        i for words in ("the lower", "and on", "in there") for i in [*tokenizer.encode(words, add_special=False), end]
    ]
    assert found.token_ids[0, :-1].tolist() == (expected * 3)[:8]


def test_every_sequence_is_read_once_an_epoch() -> None:
    data = Sequences(np.zeros((7, 5), np.int64), "x")
    seen = np.concatenate([data.batch(number, 2, seed=1) for number in range(7)])
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert seen[:7].tolist() != seen[7:].tolist()
    assert data.batch(3, 2, seed=1).tolist() == seen[6:8].tolist()
    assert np.concatenate([data.batch(n, 1, seed=1) for n in range(14)]).tolist() == seen.tolist()
    assert data.batch(0, 20, seed=1).shape == (20,)


def test_the_teacher_writes(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def write(path: Path, tokens: int, seed: int, progress: object) -> list[list[int]]:
        calls.append((path, tokens, seed))
        return [[5, 6, 7]] * 100

    monkeypatch.setattr("nybble.compress.train.data.write_own_text", write)
    found = load_sequences(open_checkpoint(llama), "self", seq_len=8, tokens=300, seed=4)
    assert calls == [(llama, 300, 4)]
    assert found.token_ids[0, :3].tolist() == [5, 6, 7] and "teacher wrote" in found.name


def test_the_teacher_goes_on_from_passages(llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def write(path: Path, tokens: int, seed: int, progress: object, *, after: list[list[int]]) -> list[list[int]]:
        begun.extend(after)
        return [[5, 6, 7]] * 100

    monkeypatch.setattr("nybble.compress.train.data.write_own_text", write)
    checkpoint = open_checkpoint(llama)
    found = load_sequences(checkpoint, f"self:{text}", seq_len=8, tokens=300)
    assert found.name == "text that the teacher wrote after text.txt"
    assert begun == [load_tokenizer(checkpoint.tokenizer).encode(text.read_text(), add_special=False)]
    with pytest.raises(ConfigError, match=r"nothing\.txt is not a file"):
        load_sequences(checkpoint, "self:nothing.txt", seq_len=8, tokens=300)


def test_several_texts_share_the_tokens(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []

    def write(path: Path, tokens: int, seed: int, progress: object) -> list[list[int]]:
        wanted.append(tokens)
        return [[5] * 9] * 1000

    monkeypatch.setattr("nybble.compress.train.data.write_own_text", write)
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "the lower"}\n')
    checkpoint = open_checkpoint(llama)
    few = len(load_tokenizer(checkpoint.tokenizer).encode("the lower", add_special=False)) + 1
    found = load_sequences(checkpoint, (str(short), str(text), "self"), seq_len=8, tokens=2400)
    rest = 2400 - few
    assert found.name == "short.jsonl and text.txt and text that the teacher wrote"
    flat = found.token_ids[:, :-1].reshape(-1)
    assert len(flat) == 2400 // 8 * 8
    assert wanted == [rest - (rest // 2 + 1)]  # the cut text ends with an end of text
    own = flat[few + rest // 2 + 1 :]
    assert set(own.tolist()) == {5, checkpoint.eos_token_ids[0]}
    load_sequences(checkpoint, (str(text), "self"), seq_len=8, tokens=2400, own_tokens=100)
    assert wanted[1:] == [100]


def test_a_data_set_by_its_name(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        @staticmethod
        def load_dataset(name: str, split: str, streaming: bool) -> list[dict[str, str]]:
            return [{"text": f"the lower {i}"} for i in range(1000)]

    monkeypatch.setitem(sys.modules, "datasets", Fake)  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: Fake)
    assert load_sequences(open_checkpoint(llama), "some/set", seq_len=8, tokens=300).name == "some/set"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\xff\xfe", "data .*x.txt is not a text in UTF-8"),
        ("x.jsonl", b"\xff\xfe", "data .*x.jsonl is not a text in UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', r"data .*x.jsonl, line 2 is not JSON"),
        ("x.jsonl", b'{"words": "a"}\n', r"data .*x.jsonl, line 1 has no text"),
        ("x.jsonl", b"\n\n", "has no lines"),
        ("x.txt", b"the", "too few for one sequence of 32"),
    ],
)
def test_text_that_cannot_be_used(llama: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_sequences(open_checkpoint(llama), str(tmp_path / name), seq_len=32, tokens=1000)


def test_what_is_not_there(llama: Path) -> None:
    checkpoint = open_checkpoint(llama)
    for name in ("nothing.txt", "nothing.jsonl"):
        with pytest.raises(ConfigError, match=f"data {name}"):
            load_sequences(checkpoint, name, seq_len=32, tokens=1000)
