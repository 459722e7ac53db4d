"""What the tests of all ways to make models smaller share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are multiplied faster by one thread than two threads wait for each other."""
    if importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that the tiny tokenizer cuts into about 20000 tokens."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    lines = [f"line {i}: the lower and the {i * 7919 % 1000} on in there, under {i % 13}\n" for i in range(600)]
    path.write_text("".join(lines), "utf-8")
    return path
