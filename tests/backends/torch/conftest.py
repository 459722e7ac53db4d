"""Small models that the tests of serving share: none of them changes one."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from models import make_tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> object:
    @functools.cache
    def make(family: str, **overrides: object) -> Path:
        return make_tiny(family, tmp_path_factory.mktemp(family) / "model", **overrides)

    return make
