"""Tool calls out of the text that a model writes, while it writes.

What cannot be read as a call of a known tool is content. Nothing here raises.
"""

from __future__ import annotations

import enum
import json
import re
import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nybble.serve.openai.tools import ToolFormat


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins. index: its place among the calls of the answer."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


ToolDelta = ContentDelta | CallStart | ArgumentsDelta


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call. arguments: JSON text of an object."""

    id: str
    name: str
    arguments: str


_TAGS = {ToolFormat.HERMES: "<tool_call>", ToolFormat.MISTRAL: "[TOOL_CALLS]", ToolFormat.LLAMA3: "<|python_tag|>"}
_END_TAG = "</tool_call>"
_FENCE = "```"
# How a call may begin without a tag: small models leave it out, and write the call as a block of code or in a list.
# White space is never given back (*+): else an answer that starts with a lot of it takes the square of its length.
_BARE = re.compile(r"\s*+(```(?:json)?\s*+)?(\[\s*+)?(?=\{)")
_BARE_SO_FAR = re.compile(r"\s*+(?:`{0,2}|```(?:j|js|jso)?|(?:```(?:json)?\s*+)?(?:\[\s*+)?)")
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([A-Za-z0-9_.-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAMED = re.compile(r"\s*([A-Za-z0-9_.-]{1,64})\s*(?:\[ARGS\]\s*)?(?=\{)")  # Mistral's newer form
_NAMED_SO_FAR = re.compile(r"\s*(?:[A-Za-z0-9_.-]{1,64}\s*(?:\[(?:A(?:R(?:G(?:S\]?)?)?)?)?\s*)?)?")
_FIRST_KEY = re.compile(r'\{\s*"([^"\\]*)"')
_CALL_KEYS = frozenset(("name", "arguments", "parameters", "type", "function", "id"))
_MAX_HEAD = 1024  # characters within which a call names its tool; else it is read when it is complete


class _Scanner:
    """Finds where the JSON object that starts at a position ends, however it arrives."""

    def __init__(self, at: int = 0) -> None:
        self._at = at
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def end(self, text: str) -> int | None:
        """The position behind the object, None if it is not complete. `text` only ever grows."""
        while self._at < len(text):
            char = text[self._at]
            self._at += 1
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = char == "\\"
                self._in_string = char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._at -= 1  # asked again, it answers the same
                    self._depth = 1
                    return self._at + 1
        return None


class _State(enum.Enum):
    TEXT = enum.auto()
    CALL = enum.auto()  # in an object that may be a call
    AFTER = enum.auto()  # behind a call: what closes it, or the next one


class ToolParser:
    """Reads one answer. White space around calls is dropped."""

    def __init__(
        self, tool_format: ToolFormat, tool_names: Iterable[str], *, parallel: bool = True, stream: bool = True
    ) -> None:
        """parallel: False drops all that follows the first call. stream: give arguments before they are complete."""
        self._format = tool_format
        self._tag = _TAGS.get(tool_format)
        self._names = frozenset(tool_names)
        self._parallel = parallel
        self._stream = stream
        self._state = _State.TEXT
        self._deltas: list[ToolDelta] = []
        self._text = ""  # not yet given out; in a call, from where its object starts
        self._space = ""  # white space at the end of the content so far: dropped if a call follows
        self._said = False  # there was content: an object that follows without a tag is no call
        self._calls = 0
        self._closers: list[str] = []  # what may stand behind the call, innermost first
        self._chained = False  # the next call may follow without an opening of its own
        self._opened = ""  # what was taken off before the object: content again if it is no call
        self._name: str | None = None  # of the call, where it stands before the object
        self._object = _Scanner()
        self._arguments: _Scanner | None = None  # of the arguments that are being given out
        self._sent = 0  # up to here in `_text`

    def push(self, text: str) -> list[ToolDelta]:
        """What the new text makes certain."""
        self._text += text
        return self._run(final=False)

    def flush(self) -> list[ToolDelta]:
        """What was held back, at the end of the answer."""
        deltas = self._run(final=True)
        if self._space and not self._calls:
            deltas.append(ContentDelta(self._space))
        return deltas

    def _run(self, *, final: bool) -> list[ToolDelta]:
        steps = {_State.TEXT: self._in_text, _State.CALL: self._in_call, _State.AFTER: self._behind_call}
        while True:
            if self._calls and not self._parallel and self._state is not _State.CALL:
                self._text = ""
            if not self._text or not steps[self._state](final):
                break
        deltas, self._deltas = self._deltas, []
        return deltas

    # Each of the three returns whether there may be more to do with the text at hand.

    def _in_text(self, final: bool) -> bool:
        at = -1 if self._tag is None else self._text.find(self._tag)
        if at == 0:
            return self._open_tag(final)
        if not self._said:
            bare = _BARE.match(self._text)
            if bare is not None:
                closers = ["]"] * (bare[2] is not None) + [_FENCE] * (bare[1] is not None)
                closers += [_END_TAG] * (self._format is ToolFormat.HERMES)  # some leave only the first tag out
                self._begin(self._text[bare.end() :], closers, chained=True)
                return True
            if not final and _BARE_SO_FAR.fullmatch(self._text):
                return False
        held = 0 if at > 0 or final else overlap(self._text, self._tag or "")
        cut = at if at > 0 else len(self._text) - held
        self._say(self._text[:cut])
        self._text = self._text[cut:]
        return at > 0

    def _open_tag(self, final: bool) -> bool:
        assert self._tag is not None
        rest = self._text[len(self._tag) :]
        bare = rest.lstrip()
        mistral = self._format is ToolFormat.MISTRAL
        inner = bare[1:].lstrip() if mistral and bare[:1] == "[" else ""
        if bare[:1] == "{" or inner[:1] == "{":
            closers = ["]"] * bool(inner) + [_END_TAG] * (self._format is ToolFormat.HERMES)
            self._begin(inner or bare, closers, chained=bool(inner) or self._format is ToolFormat.LLAMA3)
            return True
        named = _NAMED.match(rest) if mistral else None
        if named is not None and named[1] in self._names:
            self._begin(rest[named.end() :], [], chained=False, name=named[1])
            return True
        if not final and (not bare or (mistral and (bare.rstrip() == "[" or _NAMED_SO_FAR.fullmatch(rest)))):
            return False
        self._say(self._tag)
        self._text = rest
        return True

    def _begin(self, text: str, closers: list[str], *, chained: bool, name: str | None = None) -> None:
        self._state = _State.CALL
        self._opened = self._text[: len(self._text) - len(text)]
        self._text = text
        self._closers = closers
        self._chained = chained
        self._name = name
        self._object = _Scanner()
        self._arguments = None

    def _in_call(self, final: bool) -> bool:
        if self._stream and self._arguments is None:
            head = None if self._name else _HEAD.match(self._text[:_MAX_HEAD])
            name = self._name if head is None else head[1]
            if name in self._names:
                self._start(name)
                self._sent = 0 if head is None else head.end()
                self._arguments = _Scanner(self._sent)
        if self._arguments is not None:
            complete = self._give_arguments()
            end = self._object.end(self._text) if complete else None
        else:
            end = self._object.end(self._text)
            key = None if self._name else _FIRST_KEY.match(self._text[:_MAX_HEAD])
            if end is None and not final and (key is None or key[1] in _CALL_KEYS):
                return False
            call = None if end is None else _read_call(self._text[:end], self._name)
            if call is None or call[0] not in self._names:
                return self._refuse(len(self._text) if end is None else end)
            self._start(call[0])
            self._deltas.append(ArgumentsDelta(self._calls, call[1]))
        if end is None:
            return False
        self._calls += 1
        self._text = self._text[end:]
        self._state = _State.AFTER
        return True

    def _give_arguments(self) -> bool:
        """Whether all of them are given."""
        assert self._arguments is not None
        end = self._arguments.end(self._text)
        upto = len(self._text) if end is None else end
        if upto > self._sent:
            self._deltas.append(ArgumentsDelta(self._calls, self._text[self._sent : upto]))
            self._sent = upto
        return end is not None

    def _refuse(self, end: int) -> bool:
        """The object is no call: it is content."""
        self._state = _State.TEXT
        self._say(self._opened + self._text[:end])
        self._text = self._text[end:]
        return True

    def _behind_call(self, final: bool) -> bool:
        bare = self._text.lstrip()
        if self._closers:
            closer = self._closers[0]
            if bare.startswith(closer):
                self._closers = self._closers[1:]
                self._text = bare[len(closer) :]
                self._chained = False
                return True
            if not final and closer.startswith(bare):
                return False
        if self._chained:
            following = bare.lstrip(",; \t\r\n")
            if following[:1] == "{":
                self._begin(following, self._closers, chained=True)
                return True
            if not following and not final:
                return False
        self._state = _State.TEXT
        return True

    def _start(self, name: str) -> None:
        self._space = ""
        self._deltas.append(CallStart(self._calls, self._new_id(), name))

    def _say(self, text: str) -> None:
        text = self._space + text
        shown = text.rstrip()
        if shown:
            self._deltas.append(ContentDelta(shown))
            self._said = True
        self._space = text[len(shown) :]

    def _new_id(self) -> str:
        if self._format is ToolFormat.MISTRAL:  # its chat templates want ids of nine letters and digits
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


def parse_tool_calls(
    text: str, tool_format: ToolFormat, tool_names: Iterable[str], *, parallel: bool = True
) -> tuple[str, list[ToolCall]]:
    """The content and the calls of a whole answer. Unlike in a stream, a call counts only if it is complete."""
    parser = ToolParser(tool_format, tool_names, parallel=parallel, stream=False)
    content, calls = "", list[ToolCall]()
    for delta in parser.push(text) + parser.flush():
        if isinstance(delta, ContentDelta):
            content += delta.text
        elif isinstance(delta, CallStart):
            calls.append(ToolCall(delta.id, delta.name, ""))
        else:
            calls[-1] = ToolCall(calls[-1].id, calls[-1].name, delta.text)
    return content, calls


def _read_call(text: str, name: str | None) -> tuple[str, str] | None:
    """Name and arguments of a complete object, None if it is not a call."""
    try:
        call: Any = json.loads(text)
        if name is None:
            if isinstance(call.get("function"), dict):
                call = call["function"]
            name, call = call.get("name"), call.get("arguments", call.get("parameters", {}))
            if isinstance(call, str):  # some models write the arguments as text
                call = json.loads(call)
        arguments = json.dumps(call, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None
    return (name, arguments) if isinstance(name, str) and isinstance(call, dict) else None


def overlap(text: str, tag: str) -> int:
    """The length of the longest end of `text` that is a proper beginning of `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
