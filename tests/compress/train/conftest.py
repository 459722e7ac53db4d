"""Small models to train, and short ways to do it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from models import make_tiny

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers whose feed-forward width fills a block of 256 and whose hidden size does not."""
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama", hidden_size=128, intermediate_size=256)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide as `llama`, of one layer, with other weights."""
    folder = tmp_path_factory.mktemp("models") / "student"
    return make_tiny("llama", folder, seed=5, hidden_size=128, intermediate_size=256, num_hidden_layers=1)
