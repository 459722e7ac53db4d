"""Small models to quantise, and short ways to do it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from models import make_tiny

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers whose widths fill groups of 128."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    return make_tiny("llama", folder, hidden_size=128, intermediate_size=256)
