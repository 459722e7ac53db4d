"""Small models to make smaller."""

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
    """Four layers with eight query heads in four groups."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    return make_tiny("llama", folder, hidden_size=64, intermediate_size=128, **sizes)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text that the tiny tokenizer cuts into about 20000 tokens."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    lines = [f"line {i}: the lower and the {i * 7919 % 1000} on in there, under {i % 13}\n" for i in range(600)]
    path.write_text("".join(lines), "utf-8")
    return path
