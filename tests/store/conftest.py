"""A store of its own for each test, and nothing of what the user's other programs have."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.store import Library


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NYBBLE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


@pytest.fixture
def library(alone: None) -> Library:
    return Library()
