"""An answer in Markdown, rendered on a terminal while it comes.

What is finished (a paragraph, a list, a piece of code) is printed once and stays. Only the block that is still growing
is drawn again and again, and of it only as many lines as the screen holds.
"""

from __future__ import annotations

import importlib
import re
import sys
import time
from threading import Thread
from typing import TYPE_CHECKING

from nybble.cli.answer import Plain, Writer

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.markdown import Markdown

_REDRAW_SECONDS = 0.08
_ITEM = re.compile(r"(?:[-*+]|\d{1,9}[.)])(?:\s|$)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


def writer_for_terminal(markdown: bool) -> Writer:
    """Rendered Markdown on a terminal, if it is wanted; plain text everywhere else."""
    return MarkdownWriter() if markdown and sys.stdout.isatty() else Plain()


def import_early(markdown: bool) -> None:
    """Import what renders while the model is loaded, if it will be needed: later it would delay the first token."""
    if markdown and sys.stdout.isatty():
        Thread(target=_import, name="import-markdown", daemon=True).start()


def _import() -> None:
    for module in ("rich.live", "rich.markdown", "markdown_it"):
        importlib.import_module(module)


class MarkdownWriter:
    """A Writer that renders."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._tail = ""  # what is not finished
        self._printed_any = False
        self._live: Live | None = None
        self._drawn = 0.0

    def write(self, text: str) -> None:
        """Print the blocks that this finishes, and draw the one that it leaves open."""
        self._tail += text
        blocks, self._tail = split_finished(self._tail)
        for block in blocks:
            if block.strip():
                self._stop()
                self._print(block)
        if self._tail.strip() and time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self._draw()

    def end(self) -> None:
        """Print what is left."""
        self._stop()
        if self._tail.strip():
            self._print(self._tail)
        self._tail = ""

    def _print(self, text: str) -> None:
        if self._printed_any:
            self._get_console().print()
        self._printed_any = True
        self._get_console().print(_markdown(text))

    def _draw(self) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._get_console(), auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(_LastLines(self._tail, blank_before=self._printed_any), refresh=True)
        self._drawn = time.monotonic()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _get_console(self) -> Console:
        from rich.console import Console

        if self._console is None:
            self._console = Console()
        return self._console


def split_finished(text: str) -> tuple[list[str], str]:
    """The blocks that cannot change any more, and what is still growing.

    A blank line ends a block when the next line shows that it does not go on: a line that is indented, or the next
    item of a list, belongs to what stands before.
    """
    blocks: list[str] = []
    fence = ""
    begin = at = 0
    after_blank = in_list = False
    for line in text.splitlines(keepends=True):
        is_item = _ITEM.match(line) is not None
        starts_anew = after_blank and line[0] not in " \t" and bool(line.strip()) and not (in_list and is_item)
        if starts_anew and not fence:
            blocks.append(text[begin:at])
            begin = at
        if at == begin:
            in_list = is_item
        found = _FENCE.match(line)
        if fence and found and found[1].startswith(fence) and not line.strip(" `~\n"):
            fence = ""
        elif not fence and found:
            fence = found[1]
        after_blank = not line.strip() and not fence
        at += len(line)
    return blocks, text[begin:]


class _LastLines:
    """A text as Markdown, its last lines if it is longer than the screen."""

    def __init__(self, text: str, *, blank_before: bool) -> None:
        self._text = text
        self._blank_before = blank_before

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        lines = console.render_lines(_markdown(self._text), options, pad=False)
        if self._blank_before:
            lines.insert(0, [])
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def _markdown(text: str) -> Markdown:
    """Tags in angle brackets are text: a reader of HTML would not show them at all."""
    from markdown_it import MarkdownIt
    from rich.markdown import Markdown

    rendered = Markdown("")
    rendered.parsed = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).parse(text)
    return rendered
