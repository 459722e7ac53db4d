"""The interactive chat: reads messages and commands until the user leaves."""

from __future__ import annotations

from nybble.cli.answer import note
from nybble.cli.reader import read_message, reader_for_terminal
from nybble.cli.session import Session
from nybble.cli.slash import WORDS, Leave, is_command, obey
from nybble.core.errors import TokenizerError

WELCOME = "Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands."


def chat(session: Session) -> None:
    """Talk until the input ends, or the user says so."""
    reader = reader_for_terminal(WORDS)
    note(WELCOME)
    while (text := read_message(reader)) is not None:
        if not text.strip():
            continue
        try:
            if is_command(text):
                obey(text, session, reader)
            else:
                session.ask(text)
        except Leave:
            return
        except TokenizerError as error:  # the template refuses this conversation
            note(str(error))
