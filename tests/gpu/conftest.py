"""Everything here needs a GPU that PyTorch can use."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.backends.device import gpu_problem

_PROBLEM = gpu_problem()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip with the reason."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if _PROBLEM is not None:
                item.add_marker(pytest.mark.skip(reason=_PROBLEM))
