"""Thoughts of a model apart from its answer: `<think>...</think>` at the beginning of what it writes."""

from __future__ import annotations

import enum
import json
from typing import Any

from nybble.core.sampling import StructuredOutputsParams
from nybble.serve.openai.tool_parser import overlap

OPEN, CLOSE = "<think>", "</think>"


def can_think(template: str | None) -> bool:
    """Whether a chat template knows thoughts."""
    return template is not None and (OPEN in template or CLOSE in template)


class _State(enum.Enum):
    START = enum.auto()  # nothing but white space so far
    THOUGHT = enum.auto()
    BEHIND = enum.auto()  # white space between the thought and the answer
    ANSWER = enum.auto()


class ThoughtSplitter:
    """Splits one answer while it comes. White space around the thought is dropped."""

    def __init__(self, *, opened: bool) -> None:
        """opened: the prompt ends inside a thought."""
        self._state = _State.THOUGHT if opened else _State.START
        self._text = ""
        self._said = False  # something of the thought was given out

    def push(self, text: str) -> tuple[str, str]:
        """(more of the thought, more of the answer) that the new text makes certain."""
        self._text += text
        return self._run(final=False)

    def flush(self) -> tuple[str, str]:
        """What was held back, at the end."""
        return self._run(final=True)

    def _run(self, *, final: bool) -> tuple[str, str]:
        thought = ""
        if self._state is _State.START:
            bare = self._text.lstrip()
            if bare.startswith(OPEN):
                self._state = _State.THOUGHT
                self._text = bare[len(OPEN) :]
            elif final or not OPEN.startswith(bare):
                self._state = _State.ANSWER
        if self._state is _State.THOUGHT:
            thought = self._thought(final)
        if self._state is _State.BEHIND:
            self._text = self._text.lstrip()
            if self._text:
                self._state = _State.ANSWER
        if self._state is not _State.ANSWER:
            return thought, ""
        answer, self._text = self._text, ""
        return thought, answer

    def _thought(self, final: bool) -> str:
        if not self._said:
            self._text = self._text.lstrip()
        thought, closed, rest = self._text.partition(CLOSE)
        if closed:
            self._state = _State.BEHIND
            self._text = rest
            thought = thought.rstrip()
        elif final:
            self._text = ""
            thought = thought.rstrip()
        else:
            certain = self._text[: len(self._text) - overlap(self._text, CLOSE)].rstrip()
            self._text = self._text[len(certain) :]
            thought = certain
        self._said |= bool(thought)
        return thought


def thought_then_json(schema: dict[str, Any], *, opened: bool) -> StructuredOutputsParams:
    """What makes an answer JSON and leaves the thought before it free."""
    first = "thought" if opened else f"({json.dumps(OPEN)} thought)?"
    rules = [f"start: {first} %json {json.dumps(schema)}", f"thought[suffix={json.dumps(CLOSE)}]: /(?s:.*)/"]
    return StructuredOutputsParams(grammar="\n".join(rules))
