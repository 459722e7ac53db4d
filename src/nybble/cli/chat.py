"""The interactive chat: many turns over one cache, so that each turn reads little more than what is new."""

from __future__ import annotations

import importlib
import sys

from nybble.cli.answer import Figures, Interrupt, note, note_ending, show_answer
from nybble.cli.prompt import Message, as_text, chat_prompt
from nybble.core.errors import PromptError
from nybble.core.sampling import SamplingParams
from nybble.engine.load import LoadedModel
from nybble.engine.speculate import Speculate

WELCOME = "Ctrl-C stops an answer, Ctrl-D leaves, /new starts a new conversation."


def chat(
    loaded: LoadedModel,
    params: SamplingParams,
    *,
    system: str | None,
    threads: int | None,
    speculate: Speculate,
    verbose: bool,
) -> None:
    """Talk until the input ends.

    Raises:
        TokenizerError: the model has no chat template.
    """
    opening: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    chat_prompt(loaded, [*opening, {"role": "user", "content": "-"}])  # a model that cannot chat says so right away
    importlib.import_module("readline")  # gives input() its line editing and history
    note(WELCOME)
    generator = loaded.generator(speculate=speculate)
    interrupt, figures = Interrupt(), Figures(loaded, threads)
    messages = list(opening)
    while (line := _ask()) is not None:
        if line.strip() == "/new":
            messages = list(opening)
            note("new conversation")
            continue
        if not line.strip():
            continue
        asked: list[Message] = [*messages, {"role": "user", "content": line}]
        token_ids = chat_prompt(loaded, asked)
        try:
            with interrupt.listen():
                steps = generator.generate([token_ids], params)
                answer = show_answer(steps, num_prompt_tokens=len(token_ids), interrupt=interrupt)
        except PromptError:
            note(
                f"the conversation has {len(token_ids)} tokens now and the context holds {loaded.context}: your last "
                "message was not sent; shorten it, start over with /new, or come back with a larger --ctx"
            )
            continue
        if answer.num_new_tokens > 0:  # an answer stopped before it began leaves the conversation as it was
            messages = [*asked, {"role": "assistant", "content": answer.text}]
        note_ending(answer, params, loaded.context)
        if verbose:
            note(figures.line(answer))


def _ask() -> str | None:
    """The user's next message; None at the end of the input. Ctrl-C drops the line that was begun."""
    while True:
        try:
            return as_text(input(">>> "))
        except PromptError as error:
            note(str(error))
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            sys.stdout.flush()
            return None
