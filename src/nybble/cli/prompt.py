"""From what a user wrote to the tokens that a model reads."""

from __future__ import annotations

import sys

from nybble import store
from nybble.core.errors import PromptError, TokenizerError
from nybble.engine.load import LoadedModel
from nybble.tokenizer import ChatTemplate, render_to_ids

Message = dict[str, str]  # role, content
_NOT_TEXT = "the prompt is not UTF-8 text: convert it, or check which file was piped in"


def given_prompt(argument: str | None) -> str | None:
    """The prompt from the command line or from a pipe; None if there is neither, so that a chat is wanted.

    Raises:
        PromptError: it is empty, or not text.
    """
    if argument == "":
        raise PromptError("the prompt is empty: write one after the model")
    if argument is not None:
        return as_text(argument)
    if sys.stdin is not None and sys.stdin.isatty():
        return None
    try:
        text = "" if sys.stdin is None else as_text(sys.stdin.read())
    except UnicodeDecodeError as error:
        raise PromptError(_NOT_TEXT) from error
    if not text.strip():
        raise PromptError("standard input is empty: pipe a prompt into it, or write one after the model")
    return text


def as_text(written: str) -> str:
    """What a user wrote, read as UTF-8 whatever the locale says.

    Raises:
        PromptError: it is something else.
    """
    try:
        return written.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError as error:
        raise PromptError(_NOT_TEXT) from error


def raw_prompt(loaded: LoadedModel, text: str) -> list[int]:
    """The text as it is, after whatever token every text of this model begins with."""
    return loaded.tokenizer.encode(text, add_special=True)


def chat_prompt(loaded: LoadedModel, messages: list[Message], template: str | None = None) -> list[int]:
    """A conversation in the words of a chat template, up to where the answer begins.

    template: in Jinja or in Go's language; None: the one that the model file brings.

    Raises:
        TokenizerError: the model has no chat template, or it cannot be rendered with these messages.
    """
    source = loaded.checkpoint.chat_template if template is None else template
    if source is None:
        raise TokenizerError(
            "this model has no chat template, it was not made for conversations: "
            "give --raw to have it continue the prompt"
        )
    tokenizer = loaded.tokenizer
    checkpoint = loaded.checkpoint
    bos_token_id = checkpoint.bos_token_id if checkpoint.add_bos else None  # templates differ in whether they write it
    if template is not None and store.is_go_template(source):
        return render_to_ids(store.GoTemplate(source), tokenizer, messages, bos_token_id=bos_token_id)
    jinja = ChatTemplate(source, bos_token=tokenizer.bos_token or "", eos_token=tokenizer.eos_token or "")
    return render_to_ids(jinja, tokenizer, messages, bos_token_id=bos_token_id)
