"""Small models to prune."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from models import make_tiny

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers with eight query heads in four groups."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    return make_tiny("llama", folder, hidden_size=64, intermediate_size=128, **sizes)
