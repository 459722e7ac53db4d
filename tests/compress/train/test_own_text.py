"""Text that a model writes to be trained on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from nybble.compress.calibration.own_text import write_own_text
from nybble.compress.methods import Silent
from nybble.core.errors import ConfigError

pytestmark = [pytest.mark.unit]


@pytest.fixture(scope="module")
def after() -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(40) for _ in range(length)] for length in (70, 31, 32)]


def test_documents_begin_with_passages(llama: Path, after: list[list[int]]) -> None:
    documents = write_own_text(llama, 3000, 1, Silent(), after=after)
    passages = [after[0][:32], after[0][32:64], after[2]]
    assert {tuple(document[:32]) for document in documents} == {tuple(passage) for passage in passages}
    assert all(32 + 15 <= len(document) <= 257 for document in documents)
    assert sum(map(len, documents)) >= 3000
    assert documents == write_own_text(llama, 3000, 1, Silent(), after=after)
    assert documents != write_own_text(llama, 3000, 2, Silent(), after=after)


def test_without_a_text_they_begin_with_one_token(llama: Path) -> None:
    documents = write_own_text(llama, 2000, 1, Silent())
    assert len({document[0] for document in documents}) > 1
    assert all(16 <= len(document) <= 257 for document in documents)


def test_a_text_without_a_passage_is_refused(llama: Path) -> None:
    with pytest.raises(ConfigError, match="no passage of 32 tokens"):
        write_own_text(llama, 300, 0, Silent(), after=[[1, 2, 3]] * 20)
