"""Markdown on a terminal: everything that was written is shown, once."""

from __future__ import annotations

import io
import random
import re

import pytest
from rich.console import Console

from nybble.cli import markdown
from nybble.cli.answer import Plain
from nybble.cli.markdown import MarkdownWriter, split_finished, writer_for_terminal

pytestmark = pytest.mark.unit

ANSWER = """# Title

A **bold** word, `code <b>` and <think>a tag</think>.

- one
- two

```python
def f():

    return 1
```

The end"""


def shown(text: str, *, pieces: int, height: int = 25) -> str:
    """What stands on the screen in the end, without colours."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=height, color_system=None, legacy_windows=False)
    writer = MarkdownWriter(console)
    rng = random.Random(pieces)
    cuts = sorted(rng.sample(range(1, len(text)), pieces))
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        writer.write(text[begin:end])
    writer.end()
    return screen(out.getvalue())


def screen(written: str) -> str:
    """Obeys what moves the cursor: up, begin of line, erase line."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif part.endswith("A") and part.startswith("\x1b"):
            row -= int(part[2:-1] or 1)
        elif part in ("\x1b[2K", "\r"):
            lines[row] = "" if part != "\r" else lines[row]
        elif not part.startswith("\x1b"):
            lines[row] += part
    return "\n".join(line.rstrip() for line in lines)


@pytest.fixture(autouse=True)
def draw_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "_REDRAW_SECONDS", -1)


@pytest.mark.parametrize("pieces", [1, 5, 60])
def test_the_end_is_the_same_however_it_came(pieces: int) -> None:
    text = shown(ANSWER, pieces=pieces)
    for part in (
        "Title",
        "A bold word, code <b> and <think>a tag</think>.",
        "• one",
        "def f():",
        "return 1",
        "The end",
    ):
        assert text.count(part) == 1
    assert text == shown(ANSWER, pieces=2)


def test_a_block_that_is_longer_than_the_screen() -> None:
    text = "```\n" + "".join(f"line {n}\n" for n in range(50)) + "```\n"
    assert [line.split()[-1] for line in shown(text, pieces=30, height=10).splitlines() if "line" in line] == [
        str(n) for n in range(50)
    ]


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("a", ""),
        ("a\n\n", ""),
        ("a\n\nb", "a\n\n"),
        ("a\n\nb\n\nc", "a\n\n|b\n\n"),
        ("```\na\n\nb", ""),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("~~~~\n```\n\n~~~~\n\nx", "~~~~\n```\n\n~~~~\n\n"),
        ("- a\n\n- b\n\n    more\n\nc", "- a\n\n- b\n\n    more\n\n"),
        ("1. a\n\n2. b\n\nc", "1. a\n\n2. b\n\n"),
        ("a\n\n- b", "a\n\n"),
    ],
)
def test_where_a_block_ends(text: str, done: str) -> None:
    assert split_finished(text) == (done.split("|") if done else [], text[len(done.replace("|", "")) :])


def test_elsewhere_it_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    writer = writer_for_terminal(True)
    assert isinstance(writer, Plain)
    writer.write("**a**")
    writer.end()
    assert capsys.readouterr().out == "**a**\n"
