"""One server over a small real model for all tests of a session."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_server import Running, running

from models import make_tiny

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if tools %}<tool_call>{% endif %}"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_tiny("llama", tmp_path_factory.mktemp("tiny"))
    (made / "chat_template.jinja").write_text(TEMPLATE)
    return made


@pytest.fixture(scope="session")
def server(folder: Path) -> Iterator[Running]:
    with running(folder) as started:
        yield started
        for _ in range(200):  # what clients left behind is gone within a step
            if not started.engine._core.has_unfinished_requests:
                break
            time.sleep(0.02)
        started.engine._core.check_integrity()
