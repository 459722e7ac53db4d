"""Modelfiles: the lines from which a model is made, read and written.

    FROM name, path of a GGUF file, or folder        TEMPLATE text        LICENSE text (repeatable)
    PARAMETER name value (`stop` repeatable)         SYSTEM text          MESSAGE role text (repeatable)
    ADAPTER path                                     DRAFT name or path of a model that guesses tokens
                                                     # comment

The words are case-insensitive. A value is the rest of its line, or "in quotes" or \"\"\"in three\"\"\", which may span
lines; there are no escapes. The grammar is Ollama's. This module knows nothing of files: names stay as written.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nybble.core.errors import ConfigError

Value = int | float | str | list[str]

MAX_CHARS = 1 << 22
INSTRUCTIONS = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "DRAFT")
ROLES = ("system", "user", "assistant")
_INTEGERS = (
    "num_ctx", "num_predict", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "seed", "top_k",
    "repeat_last_n", "draft_num_predict",
)  # fmt: skip
_NUMBERS = (
    "temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_SWITCHES = ("use_mmap",)
_TEXTS = ("stop",)
_MODES = ("speculate",)
PARAMETERS = (*_INTEGERS, *_NUMBERS, *_SWITCHES, *_TEXTS, *_MODES)
# What Ollama still reads and no longer uses.
DEPRECATED = (
    "penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "mirostat", "mirostat_tau",
    "mirostat_eta", "numa", "embedding_only", "num_gqa", "rope_frequency_base", "rope_frequency_scale", "tfs_z",
)  # fmt: skip
_LEFT_OUT = {
    "REQUIRES": "it names a version of Ollama",
    "RENDERER": "it names a part of Ollama's own code; the chat template is used",
    "PARSER": "it names a part of Ollama's own code; nybble finds tool calls and thoughts by the model's template",
}
_SPACE = " \t\r\n"
_EXPECTED_INSTRUCTION = f"one of {', '.join(INSTRUCTIONS)}, or a comment after #"


class ModelfileError(ConfigError):
    """A line that cannot be used: where it is (both counted from 1), and what was expected there."""

    def __init__(self, what: str, *, line: int, column: int, expected: str, where: str = "the Modelfile") -> None:
        super().__init__(f"{where}, line {line}, column {column}: {what}; expected {expected}")
        self.what = what
        self.line = line
        self.column = column
        self.expected = expected

    def named(self, where: str) -> ModelfileError:
        """The same error in a file of this name."""
        return ModelfileError(self.what, line=self.line, column=self.column, expected=self.expected, where=where)


@dataclass(frozen=True, slots=True)
class Command:
    """One instruction. argument: the parameter's name or the message's role. line, column: where its value begins."""

    word: str
    value: str
    argument: str = ""
    line: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class Modelfile:
    """What a Modelfile says. notes: sentences about lines that have no effect here."""

    source: Command  # FROM
    adapters: tuple[Command, ...]
    template: Command | None
    draft: Command | None
    system: str | None
    parameters: Mapping[str, Value]
    messages: tuple[tuple[str, str], ...]
    license: tuple[str, ...]
    notes: tuple[str, ...]


def parse_modelfile(text: str) -> Modelfile:
    """Read a Modelfile. Of several TEMPLATE, SYSTEM or equal PARAMETER lines the last one counts.

    Raises:
        ModelfileError: a line is not one, or FROM is missing.
    """
    if len(text) > MAX_CHARS:
        raise _error(f"the text has {len(text)} characters", 1, 1, f"at most {MAX_CHARS}")
    by_word: dict[str, list[Command]] = {word: [] for word in (*INSTRUCTIONS, *_LEFT_OUT)}
    end = 1
    for command in read_commands(text):
        by_word[command.word].append(command)
        end = command.line
    if not by_word["FROM"]:
        raise _error("FROM is missing", end, 1, "a line FROM with a model's name or path")
    if len(by_word["FROM"]) > 1:
        second = by_word["FROM"][1]
        raise _error("this is the second FROM", second.line, second.column, "one model, without projector")
    parameters, notes = _parameters(by_word["PARAMETER"])
    notes += [f"{word} has no effect: {why}" for word, why in _LEFT_OUT.items() if by_word[word]]
    system = by_word["SYSTEM"]
    return Modelfile(
        source=by_word["FROM"][0],
        adapters=tuple(by_word["ADAPTER"]),
        template=by_word["TEMPLATE"][-1] if by_word["TEMPLATE"] else None,
        draft=by_word["DRAFT"][-1] if by_word["DRAFT"] else None,
        system=system[-1].value if system else None,
        parameters=parameters,
        messages=tuple((command.argument, command.value) for command in by_word["MESSAGE"]),
        license=tuple(command.value for command in by_word["LICENSE"]),
        notes=tuple(notes),
    )


def _parameters(commands: Iterable[Command]) -> tuple[dict[str, Value], list[str]]:
    parameters: dict[str, Value] = {}
    notes = []
    for command in commands:
        if command.argument in DEPRECATED:
            notes.append(f"PARAMETER {command.argument} has no effect: it is one that Ollama gave up")
            continue
        value = parameter_value(command.argument, command.value)
        if value is None:
            raise _error(
                f"{command.argument} is {command.value!r:.60}", command.line, command.column, _kind(command.argument)
            )
        before = parameters.get(command.argument)
        parameters[command.argument] = (
            [*before, *value] if isinstance(before, list) and isinstance(value, list) else value
        )
    return parameters, notes


def parameter_value(name: str, text: str) -> Value | None:
    """The value of a parameter in its type; None if the text is not one. `name` must be in PARAMETERS."""
    try:
        if name in _INTEGERS:
            return int(text, 10)
        if name in _NUMBERS:
            number = float(text)
            return number if abs(number) < 1e9 else None  # nor infinity, nor NaN
    except ValueError:
        return None
    if name in _SWITCHES:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
    if name in _MODES:
        return text if re.fullmatch("auto|off|ngram|draft=.+", text) else None
    return [text]


def _kind(name: str) -> str:
    if name in _MODES:
        return "auto, off, ngram or draft=MODEL"
    if name in _INTEGERS:
        return "a whole number"
    return "a number" if name in _NUMBERS else "true or false"


def read_commands(text: str) -> Iterable[Command]:
    """The instructions in the order of their lines. Raises ModelfileError."""
    return _Reader(text.removeprefix("\ufeff")).commands()


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line_begins = [0, *(found.end() for found in re.finditer("\n", text))]

    def commands(self) -> Iterable[Command]:
        while True:
            self._skip(_SPACE)
            if self._at == len(self._text):
                return
            if self._text[self._at] == "#":
                self._at = self._line_end()
                continue
            yield self._command()

    def _command(self) -> Command:
        begin = self._at
        word = self._word().upper()
        if word not in INSTRUCTIONS and word not in _LEFT_OUT:
            raise self._error(f"{self._text[begin : self._at]!r:.60} is no instruction", begin, _EXPECTED_INSTRUCTION)
        argument = ""
        if word == "PARAMETER":
            argument = self._choice((*PARAMETERS, *DEPRECATED), "the name of a parameter", PARAMETERS)
        elif word == "MESSAGE":
            argument = self._choice(ROLES, "a role", ROLES)
        self._skip(" \t")
        begin = self._at
        value = self._value()
        if value is None:
            raise self._error(f"{word} has no value", begin, f"a value after {argument or word}")
        return Command(word, value, argument, *self._position(begin))

    def _choice(self, known: Iterable[str], what: str, shown: Iterable[str]) -> str:
        self._skip(" \t")
        begin = self._at
        word = self._word()
        if word.lower() not in known:
            found = f"{word!r:.60} is not {what}" if word else f"{what} is missing"
            raise self._error(found, begin, f"one of {', '.join(shown)}")
        return word.lower()

    def _value(self) -> str | None:
        for quote in ('"""', '"'):
            if self._text.startswith(quote, self._at):
                return self._quoted(quote)
        begin = self._at
        self._at = self._line_end()
        return self._text[begin : self._at].strip(_SPACE) or None

    def _quoted(self, quote: str) -> str:
        """Up to the quotes at the end of a line: those inside a line are part of the value."""
        opened = self._at
        self._at += len(quote)
        begin = self._at
        while True:
            line_begin, self._at = self._at, self._line_end()
            line = self._text[line_begin : self._at].rstrip(_SPACE)
            if line.endswith(quote):
                return self._text[begin : line_begin + len(line) - len(quote)]
            if self._at == len(self._text):
                raise self._error(f"{quote} is opened and never closed", opened, f"{quote} at the end of a line")
            self._at += 1

    def _word(self) -> str:
        begin = self._at
        while self._at < len(self._text) and self._text[self._at] not in _SPACE:
            self._at += 1
        return self._text[begin : self._at]

    def _skip(self, characters: str) -> None:
        while self._at < len(self._text) and self._text[self._at] in characters:
            self._at += 1

    def _line_end(self) -> int:
        end = self._text.find("\n", self._at)
        return len(self._text) if end < 0 else end

    def _position(self, at: int) -> tuple[int, int]:
        line = bisect_right(self._line_begins, at)
        return line, at - self._line_begins[line - 1] + 1

    def _error(self, what: str, at: int, expected: str) -> ModelfileError:
        line, column = self._position(at)
        return _error(what, line, column, expected)


def _error(what: str, line: int, column: int, expected: str) -> ModelfileError:
    return ModelfileError(what, line=line, column=column, expected=expected)


def format_modelfile(commands: Iterable[Command]) -> str:
    """The text that `read_commands` reads back.

    Raises:
        ConfigError: a value has three double quotes at the end of a line, which no quotes can hold.
    """
    return "".join(f"{' '.join(filter(None, (one.word, one.argument)))} {_quote(one.value)}\n" for one in commands)


def _quote(value: str) -> str:
    lines = value.split("\n")
    if value and value.strip(_SPACE) == value and not value.startswith('"') and len(lines) == 1 and "\r" not in value:
        return value
    if any(line.rstrip(_SPACE).endswith('"""') for line in lines[:-1]):
        raise ConfigError('a text with """ at the end of a line cannot be written in a Modelfile: put a "." after them')
    return f'"""{value}"""'
