"""Reads the part of Go's text/template that chat templates of Ollama's models are written in. It runs nothing.

Actions: if, else if, else, range, with, end, break, continue, comments, trim markers, variables, pipelines, parentheses
and the functions of `FUNCTIONS`. What else the language has (define, template, block, printf, methods) is refused by
name.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from nybble.core.errors import TokenizerError

MAX_SOURCE_CHARS = 1 << 18
MAX_DEPTH = 60  # of nested actions and parentheses
FUNCTIONS = {
    "and": (1, 99), "or": (1, 99), "not": (1, 1), "eq": (2, 99), "ne": (2, 2), "lt": (2, 2), "le": (2, 2), "gt": (2, 2),
    "ge": (2, 2), "len": (1, 1), "index": (2, 9), "slice": (2, 3), "json": (1, 1), "print": (0, 99),
    "currentDate": (0, 1), "yesterdayDate": (0, 1),
}  # fmt: skip  # name -> fewest and most arguments
# What messages, tools and calls have. Any other name is refused when the template is read, not while someone waits.
FIELDS = {
    "System", "Prompt", "Response", "Suffix", "Messages", "Tools", "Think", "ThinkLevel", "IsThinkSet", "Role",
    "Content", "Thinking", "Images", "ToolCalls", "ToolName", "ToolCallID", "ID", "Function", "Index", "Name",
    "Arguments", "Type", "Description", "Parameters", "Required", "Properties", "Items", "Enum", "Defs", "AnyOf",
}  # fmt: skip

_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)|(?P<number>-?\d+(?:\.\d+)?)"""
    r"""|(?P<variable>\$\w*)|(?P<field>\.[A-Za-z_]\w*)|(?P<dot>\.)|(?P<word>[A-Za-z_]\w*)"""
    r"""|(?P<sign>:=|=|\||\(|\)|,)"""
)


@dataclass(frozen=True, slots=True)
class Literal:
    value: str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Dot:
    """The value that `.` stands for at the moment."""


@dataclass(frozen=True, slots=True)
class Variable:
    name: str  # with its $; "$" alone is what the template was given


@dataclass(frozen=True, slots=True)
class Field:
    of: Expression
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    function: str
    arguments: tuple[Expression, ...]


Expression = Literal | Dot | Variable | Field | Call


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Print:
    value: Expression


@dataclass(frozen=True, slots=True)
class Assign:
    name: str
    value: Expression
    declares: bool


@dataclass(frozen=True, slots=True)
class If:
    """`if`, and `with`, which also sets the dot."""

    condition: Expression
    then: tuple[Node, ...]
    otherwise: tuple[Node, ...]
    sets_dot: bool = False
    variable: str = ""


@dataclass(frozen=True, slots=True)
class Range:
    over: Expression
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...]
    key: str = ""
    value: str = ""


@dataclass(frozen=True, slots=True)
class Leave:
    """break or continue."""

    word: str


Node = Text | Print | Assign | If | Range | Leave


@dataclass(slots=True)
class Parsed:
    """A template. fields: every name after a dot."""

    nodes: tuple[Node, ...]
    fields: set[str] = field(default_factory=set)


def parse_go(source: str) -> Parsed:
    """Read a template. Raises TokenizerError if it is too long, not one, or has what is not supported."""
    if len(source) > MAX_SOURCE_CHARS:
        raise TokenizerError(f"the template has {len(source)} characters, more than {MAX_SOURCE_CHARS}")
    parser = _Parser(_pieces(source))
    nodes, end = parser.block(0, ())
    assert not end
    return Parsed(nodes, parser.fields)


def _pieces(source: str) -> list[tuple[bool, str]]:
    """(is action, text), with the space that trim markers take already gone."""
    pieces: list[tuple[bool, str]] = []
    at = 0
    trim = False
    while True:
        begin = source.find("{{", at)
        text = source[at:] if begin < 0 else source[at:begin]
        if trim:
            text = text.lstrip(" \t\r\n")
        if begin < 0:
            pieces.append((False, text))
            return pieces
        end = _action_end(source, begin + 2)
        action = source[begin + 2 : end]
        if len(action) > 1 and action[0] == "-" and action[1].isspace():
            text, action = text.rstrip(" \t\r\n"), action[1:]
        trim = len(action) > 1 and action[-1] == "-" and action[-2].isspace()
        if trim:
            action = action[:-1]
        pieces += [(False, text), (True, action.strip())]
        at = end + 2


def _action_end(source: str, at: int) -> int:
    """Where the `}}` of an action is: not one inside a string or a comment."""
    begin = at
    while at < len(source):
        if source.startswith("}}", at):
            return at
        character = source[at]
        if source.startswith("/*", at):
            at = source.find("*/", at)
        elif character == "`":
            at = source.find("`", at + 1)
        elif character == '"':
            found = re.compile(r'"(?:[^"\\\n]|\\.)*"').match(source, at)
            at = found.end() - 1 if found else -1
        if at < 0:
            break
        at += 1
    raise TokenizerError(f"the template has an action that does not end: {source[begin - 2 : begin + 40]!r}")


class _Parser:
    def __init__(self, pieces: list[tuple[bool, str]]) -> None:
        self._pieces = pieces
        self._at = 0
        self.fields: set[str] = set()

    def block(self, depth: int, ends: tuple[str, ...]) -> tuple[tuple[Node, ...], str]:
        """Nodes up to an action that begins with one of `ends`, and that action."""
        if depth > MAX_DEPTH:
            raise TokenizerError(f"the template nests more than {MAX_DEPTH} actions")
        nodes: list[Node] = []
        while self._at < len(self._pieces):
            is_action, text = self._pieces[self._at]
            self._at += 1
            if not is_action:
                if text:
                    nodes.append(Text(text))
                continue
            if text.startswith("/*"):
                continue
            word = text.split(maxsplit=1)[0] if text else ""
            if word in ("end", "else"):
                if word not in ends:
                    raise TokenizerError(f"the template has {{{{ {text} }}}} where nothing is open")
                return tuple(nodes), text
            nodes.append(self._action(word, text, depth))
        if ends:
            raise TokenizerError("the template lacks an {{ end }}")
        return tuple(nodes), ""

    def _action(self, word: str, text: str, depth: int) -> Node:
        rest = text[len(word) :]
        if word in ("if", "with"):
            return self._if(word, rest, depth)
        if word == "range":
            return self._range(rest, depth)
        if text in ("break", "continue"):
            return Leave(text)
        tokens = self._tokens(text)
        if tokens.kinds(0)[:1] == ["variable"] and tokens.peek(1) in (":=", "="):
            name, sign = tokens.take(), tokens.take()
            return Assign(name, tokens.whole(), sign == ":=")
        return Print(tokens.whole())

    def _if(self, word: str, rest: str, depth: int) -> If:
        tokens = self._tokens(rest)
        variable = ""
        if tokens.kinds(0)[:1] == ["variable"] and tokens.peek(1) == ":=":
            variable = tokens.take()
            tokens.take()
        condition = tokens.whole()
        then, end = self.block(depth + 1, ("else", "end"))
        otherwise: tuple[Node, ...] = ()
        if end.startswith("else"):
            after = end[4:].strip()
            if after:
                inner, _, condition_text = after.partition(" ")
                if inner not in ("if", "with"):
                    raise TokenizerError(f"the template has {{{{ {end} }}}}, which is no branch")
                otherwise = (self._if(inner, condition_text, depth + 1),)
            else:
                otherwise, _ = self.block(depth + 1, ("end",))
        return If(condition, then, otherwise, word == "with", variable)

    def _range(self, rest: str, depth: int) -> Range:
        tokens = self._tokens(rest)
        key = value = ""
        if tokens.peek(1) == "," and tokens.peek(3) == ":=":
            key, _, value, _ = (tokens.take() for _ in range(4))
        elif tokens.peek(1) == ":=":
            value = tokens.take()
            tokens.take()
        over = tokens.whole()
        body, end = self.block(depth + 1, ("else", "end"))
        otherwise: tuple[Node, ...] = ()
        if end.startswith("else"):
            otherwise, _ = self.block(depth + 1, ("end",))
        return Range(over, body, otherwise, key, value)

    def _tokens(self, text: str) -> _Tokens:
        return _Tokens(text, self.fields)


class _Tokens:
    """The inside of one action."""

    def __init__(self, text: str, fields: set[str]) -> None:
        self._action = text.strip()
        self._fields = fields
        self._at = 0
        self._list: list[tuple[str, str, bool]] = []  # kind, text, whether it follows without space
        at, spaced = 0, True
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise self._wrong(f"{text[at : at + 20]!r} is not part of a template's language")
            at = found.end()
            if found.lastgroup != "space":
                self._list.append((str(found.lastgroup), found[0], not spaced))
            spaced = found.lastgroup == "space"

    def kinds(self, at: int) -> list[str]:
        return [kind for kind, _, _ in self._list[at:]]

    def peek(self, ahead: int = 0) -> str:
        at = self._at + ahead
        return self._list[at][1] if at < len(self._list) else ""

    def take(self) -> str:
        self._at += 1
        return self._list[self._at - 1][1]

    def whole(self) -> Expression:
        """All that is left, as one pipeline."""
        value = self._pipeline(0)
        if self._at < len(self._list):
            raise self._wrong(f"{self.peek()!r} was not expected")
        return value

    def _pipeline(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise self._wrong("it is nested too deeply")
        value = self._command(depth, None)
        while self.peek() == "|":
            self.take()
            value = self._command(depth, value)
        return value

    def _command(self, depth: int, piped: Expression | None) -> Expression:
        """A function with its arguments, or a value. What is piped in becomes the last argument."""
        if self._at >= len(self._list):
            raise self._wrong("a value is missing")
        kind, text, _ = self._list[self._at]
        if kind != "word" or text in ("true", "false", "nil"):
            if piped is not None:
                raise self._wrong("a value cannot be piped into another one")
            return self._operand(depth)
        self.take()
        if text not in FUNCTIONS:
            raise self._wrong(f"{text} is not supported; there are {', '.join(FUNCTIONS)}")
        arguments = []
        while self._at < len(self._list) and self.peek() not in ("|", ")"):
            arguments.append(self._operand(depth))
        if piped is not None:
            arguments.append(piped)
        fewest, most = FUNCTIONS[text]
        if not fewest <= len(arguments) <= most:
            raise self._wrong(f"{text} cannot take {len(arguments)} values")
        return Call(text, tuple(arguments))

    def _operand(self, depth: int) -> Expression:
        kind, text, _ = self._list[self._at]
        self._at += 1
        value: Expression
        if text == "(":
            value = self._pipeline(depth + 1)
            if self.peek() != ")":
                raise self._wrong("a closing parenthesis is missing")
            self.take()
        elif kind == "field":
            value = Field(Dot(), self._name(text))
        elif kind == "dot":
            value = Dot()
        elif kind == "variable":
            value = Variable(text)
        elif kind == "word" and text in FUNCTIONS:  # without arguments
            self._at -= 1
            raise self._wrong(f"{text} needs parentheses here")
        else:
            value = Literal(self._literal(kind, text))
        while self._at < len(self._list) and self._list[self._at][0] == "field" and self._list[self._at][2]:
            value = Field(value, self._name(self.take()))
        return value

    def _name(self, text: str) -> str:
        name = text[1:]
        if name not in FIELDS:
            raise self._wrong(f".{name} is not something that messages, tools or calls have")
        self._fields.add(name)
        return name

    def _literal(self, kind: str, text: str) -> str | int | float | bool | None:
        if kind == "number":
            return float(text) if "." in text else int(text)
        if kind == "string" and text[0] == "`":
            return text[1:-1]
        if kind == "string":
            try:
                return str(json.loads(text, strict=False))  # the escapes that templates use are JSON's too
            except ValueError:
                raise self._wrong(f"{text} has an escape that is not supported") from None
        if text in ("true", "false", "nil"):
            return {"true": True, "false": False, "nil": None}[text]
        raise self._wrong(f"{text!r} is not a value")

    def _wrong(self, why: str) -> TokenizerError:
        return TokenizerError(f"the template has {{{{ {self._action[:80]} }}}}: {why}")
