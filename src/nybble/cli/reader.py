"""Reads what a user writes in a chat: with history and editing on a terminal, line by line elsewhere."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Protocol

from nybble.cli.answer import note
from nybble.cli.prompt import as_text
from nybble.core.env import home
from nybble.core.errors import PromptError

PROMPT, MORE = ">>> ", "... "
_QUOTES = '"""'


class Reader(Protocol):
    """One line at a time. Raises EOFError at the end, KeyboardInterrupt on Ctrl-C."""

    keeps_history: bool

    def line(self, prompt: str) -> str: ...


class LineReader:
    """Python's own input(), with readline's editing where there is one."""

    def __init__(self) -> None:
        self.keeps_history = True
        importlib.import_module("readline")

    def line(self, prompt: str) -> str:
        """The next line."""
        return input(prompt)


class TerminalReader:
    """prompt_toolkit: editing, search (Ctrl-R), and a history that later chats have too."""

    def __init__(self, commands: list[str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.shortcuts import CompleteStyle

        self.keeps_history = True
        path = home() / "history"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600))  # nobody else's to read
            history: FileHistory | InMemoryHistory = FileHistory(str(path))
        except OSError:
            history = InMemoryHistory()
        completer = WordCompleter(commands, sentence=True)
        below = CompleteStyle.READLINE_LIKE  # a menu would keep lines of the screen free for itself
        self._session: PromptSession[str] = PromptSession(
            history=history, completer=completer, complete_style=below, complete_while_typing=False
        )
        self._without: PromptSession[str] = PromptSession(
            completer=completer, complete_style=below, complete_while_typing=False
        )

    def line(self, prompt: str) -> str:
        """The next line, or several that were pasted."""
        return (self._session if self.keeps_history else self._without).prompt(prompt)


def reader_for_terminal(commands: list[str]) -> Reader:
    """The better one if both ends are a terminal."""
    return TerminalReader(commands) if sys.stdin.isatty() and sys.stdout.isatty() else LineReader()


def read_message(reader: Reader) -> str | None:
    """The user's next message; None at the end of the input. Ctrl-C drops what was begun.

    Three double quotes begin a message of several lines, and three end it.
    """
    while True:
        try:
            text = as_text(reader.line(PROMPT))
            return _several_lines(text, reader.line) if _opens(text) else text
        except PromptError as error:
            note(str(error))
        except KeyboardInterrupt:
            print()
        except EOFError:
            print(flush=True)
            return None


def _opens(text: str) -> bool:
    """Whether quotes at the start, or of a command's value, are not closed."""
    before, quotes, rest = text.partition(_QUOTES)
    at_start = not before.strip() or before.lstrip().startswith("/set ")
    return bool(quotes) and at_start and _QUOTES not in rest


def _several_lines(first: str, line: Callable[[str], str]) -> str:
    before, _, begun = first.partition(_QUOTES)
    lines = [begun] if begun else []
    while True:
        text = as_text(line(MORE))
        if text.rstrip().endswith(_QUOTES):
            last = text.rstrip().removesuffix(_QUOTES)
            return before + "\n".join([*lines, last] if last else lines)
        lines.append(text)
