"""No file grows beyond what can be held in the head."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 800
SUFFIXES = (".py", ".cpp", ".h")
ALLOWED: dict[str, str] = {}  # path -> why it may be longer


def too_long(files: dict[str, int]) -> list[str]:
    return [f"{name}: {lines} lines" for name, lines in files.items() if lines > MAX_LINES and name not in ALLOWED]


@pytest.mark.unit
def test_no_file_is_too_long() -> None:
    files = {}
    for folder in ("src", "native", "tests", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                files[str(path.relative_to(ROOT))] = len(path.read_text("utf-8").splitlines())
    assert files
    assert not too_long(files)


@pytest.mark.unit
def test_a_file_over_the_limit_is_found() -> None:
    assert too_long({"a.py": MAX_LINES, "b.py": MAX_LINES + 1}) == [f"b.py: {MAX_LINES + 1} lines"]


@pytest.mark.unit
def test_every_exception_is_still_needed() -> None:
    for name in ALLOWED:
        assert len((ROOT / name).read_text("utf-8").splitlines()) > MAX_LINES
