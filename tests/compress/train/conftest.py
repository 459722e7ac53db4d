"""Small models to train, and short ways to do it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import make_tiny

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are multiplied faster by one thread than two threads wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers whose feed-forward width fills a block of 256 and whose hidden size does not."""
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama", hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide as `llama`, of one layer, with other weights."""
    folder = tmp_path_factory.mktemp("models") / "student"
    return make_tiny("llama", folder, seed=5, hidden_size=128, intermediate_size=256, num_hidden_layers=1)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that the tiny tokenizer cuts into about 20000 tokens."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    lines = [f"line {i}: the lower and the {i * 7919 % 1000} on in there, under {i % 13}\n" for i in range(600)]
    path.write_text("".join(lines), "utf-8")
    return path
