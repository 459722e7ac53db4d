"""Writes prompts by Go templates, as Ollama does for the models that come with one.

Templates are data here: a small interpreter walks them, over plain values, with limits on steps and on the text they
make. Two styles exist. One walks over `.Messages`. The older one knows `.System`, `.Prompt` and `.Response` and is
rendered once for each turn; what it has after `.Response` is left out at the end, where the model's answer begins.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from nybble.core.errors import TokenizerError
from nybble.store.go_parse import (
    Assign,
    Call,
    Dot,
    Expression,
    Field,
    If,
    Literal,
    Node,
    Print,
    Range,
    Text,
    Variable,
    parse_go,
)

MAX_STEPS = 1_000_000
MAX_OUTPUT_CHARS = 1 << 22
_OWN_NAMES = {
    "ToolCalls": "tool_calls",
    "ToolName": "tool_name",
    "ToolCallID": "tool_call_id",
    "Defs": "$defs",
    "AnyOf": "anyOf",
}
_EMPTY = {"Tools": [], "Think": False, "ThinkLevel": "", "IsThinkSet": False, "Suffix": ""}


class GoTemplate:
    """A template, read once. Raises TokenizerError if it uses what is not supported (see nybble.store.go_parse)."""

    def __init__(self, source: str) -> None:
        parsed = parse_go(source)
        self._nodes = parsed.nodes
        self._walks_messages = "Messages" in parsed.fields
        self._takes_suffix = "Suffix" in parsed.fields
        if not self._walks_messages and "Response" not in parsed.fields:
            self._nodes = (*self._nodes, Print(Field(Dot(), "Response")))

    def render(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The conversation as the model reads it. variables: tools, suffix, think, ...; unknown ones are not read.

        Raises:
            TokenizerError: the template fails, or takes too much time or memory.
        """
        given = {**_EMPTY, **{_go_name(name): value for name, value in variables.items() if value is not None}}
        system, turns = _collate(messages)
        run = _Run()
        suffix = given["Suffix"]
        try:
            if suffix and self._takes_suffix:
                prompt = "\n\n".join(str(turn["content"]) for turn in turns if turn["role"] == "user")
                run.execute(self._nodes, {**given, "System": system, "Prompt": prompt, "Response": ""})
            elif self._walks_messages:
                run.execute(self._nodes, {**given, "System": system, "Messages": turns, "Response": "", "Prompt": ""})
            else:
                self._render_turns(run, turns, given, add_generation_prompt)
        except RecursionError:
            raise TokenizerError("the template or what it is given is nested too deeply") from None
        return "".join(run.parts)

    def _render_turns(
        self, run: _Run, turns: Sequence[Mapping[str, Any]], given: Mapping[str, object], open_end: bool
    ) -> None:
        turn = {"System": "", "Prompt": "", "Response": ""}

        def flush() -> None:
            run.execute(self._nodes, {**given, **turn})
            turn.update(System="", Prompt="", Response="")

        for message in turns:
            role, content = message["role"], message["content"]
            if role == "system":
                if turn["Prompt"] or turn["Response"]:
                    flush()
                turn["System"] = content
            elif role == "assistant":
                turn["Response"] = content
            else:
                if turn["Response"]:
                    flush()
                turn["Prompt"] = content
        nodes = self._nodes
        if open_end:
            nodes, _ = _up_to_response(self._nodes)
        run.execute(nodes, {**given, **turn})


def _go_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _collate(messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """All system messages as one text, and the turns; neighbours with the same role become one, unless of tools."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        turn: dict[str, Any] = {"role": "", **message, "content": _text(message.get("content"))}
        before = turns[-1] if turns else None
        if before and before["role"] == turn["role"] != "tool" and not (before | turn).get("tool_calls"):
            before["content"] += "\n\n" + turn["content"]
        else:
            turns.append(turn)
    return "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system"), turns


def _text(content: object) -> str:
    """A message's text, also where it comes in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _up_to_response(nodes: Sequence[Node]) -> tuple[tuple[Node, ...], bool]:
    """The template without what follows `.Response`, and whether that was in it."""
    kept: list[Node] = []
    for node in nodes:
        if isinstance(node, Print) and _reads_response(node.value):
            return (*kept, node), True
        if isinstance(node, If):
            then, cut = _up_to_response(node.then)
            otherwise, cut_too = _up_to_response(node.otherwise)
            kept.append(If(node.condition, then, otherwise, node.sets_dot, node.variable))
            if cut or cut_too:
                return tuple(kept), True
        elif isinstance(node, Range):
            body, cut = _up_to_response(node.body)
            kept.append(Range(node.over, body, node.otherwise, node.key, node.value))
            if cut:
                return tuple(kept), True
        else:
            kept.append(node)
    return tuple(kept), False


def _reads_response(expression: Expression) -> bool:
    if isinstance(expression, Field):
        return expression.name == "Response" or _reads_response(expression.of)
    return isinstance(expression, Call) and any(map(_reads_response, expression.arguments))


class _LoopEnd(Exception):
    def __init__(self, word: str) -> None:
        self.word = word


class _Run:
    """One rendering."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self._length = 0
        self._steps = 0
        self._scopes: list[dict[str, Any]] = [{}]

    def execute(self, nodes: Sequence[Node], data: Mapping[str, Any]) -> None:
        self._scopes = [{"$": data}]
        try:
            self._nodes(nodes, data)
        except _LoopEnd as end:
            raise TokenizerError(f"the template has {{{{ {end.word} }}}} outside of a range") from None

    def _nodes(self, nodes: Sequence[Node], dot: Any) -> None:
        for node in nodes:
            self._step()
            if isinstance(node, Text):
                self._write(node.text)
            elif isinstance(node, Print):
                self._write(_printed(self._value(node.value, dot)))
            elif isinstance(node, Assign):
                self._assign(node, self._value(node.value, dot))
            elif isinstance(node, If):
                self._if(node, dot)
            elif isinstance(node, Range):
                self._range(node, dot)
            else:
                raise _LoopEnd(node.word)

    def _if(self, node: If, dot: Any) -> None:
        condition = self._value(node.condition, dot)
        self._scopes.append({node.variable: condition} if node.variable else {})
        inner = condition if node.sets_dot and condition else dot
        self._nodes(node.then if condition else node.otherwise, inner)
        self._scopes.pop()

    def _range(self, node: Range, dot: Any) -> None:
        over = self._value(node.over, dot)
        items = _items(over)
        if not items:
            self._nodes(node.otherwise, dot)
        depth = len(self._scopes)
        for key, value in items:
            self._step()
            names = {node.key: key, node.value: value}
            self._scopes.append({name: bound for name, bound in names.items() if name})
            try:
                self._nodes(node.body, value)
            except _LoopEnd as end:
                del self._scopes[depth:]
                if end.word == "break":
                    break
            del self._scopes[depth:]

    def _assign(self, node: Assign, value: Any) -> None:
        if node.declares:
            self._scopes[-1][node.name] = value
            return
        self._scope(node.name)[node.name] = value

    def _scope(self, name: str) -> dict[str, Any]:
        for scope in self._scopes[::-1]:
            if name in scope:
                return scope
        raise TokenizerError(f"the template uses {name}, which it never set")

    def _value(self, expression: Expression, dot: Any) -> Any:
        self._step()
        if isinstance(expression, Literal):
            return expression.value
        if isinstance(expression, Dot):
            return dot
        if isinstance(expression, Variable):
            return self._scope(expression.name)[expression.name]
        if isinstance(expression, Field):
            return _field(self._value(expression.of, dot), expression.name)
        if expression.function in ("and", "or"):  # their arguments are looked at only as far as needed
            value = None
            for argument in expression.arguments:
                value = self._value(argument, dot)
                if bool(value) == (expression.function == "or"):
                    break
            return value
        arguments = [self._value(argument, dot) for argument in expression.arguments]
        try:
            return _apply(expression.function, arguments)
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise TokenizerError(f"the template's {expression.function} fails: {error}") from None

    def _write(self, text: str) -> None:
        self._length += len(text)
        if self._length > MAX_OUTPUT_CHARS:
            raise TokenizerError(f"the template makes a text of more than {MAX_OUTPUT_CHARS} characters")
        self.parts.append(text)

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TokenizerError(f"the template takes more than {MAX_STEPS} steps")


def _field(value: Any, name: str) -> Any:
    """A value by its Go name; None if it is not there, as an empty value of Go's is false and prints nothing."""
    if not isinstance(value, Mapping):
        if value is None:
            return None
        raise TokenizerError(f"the template asks for .{name} of {type(value).__name__}, which has no fields")
    for known in (name, _OWN_NAMES.get(name, name.lower())):
        if known in value:
            return value[known]
    return None


def _items(over: Any) -> list[tuple[Any, Any]]:
    if isinstance(over, Mapping):
        return sorted(over.items())
    if isinstance(over, list | tuple):
        return list(enumerate(over))
    if isinstance(over, int) and not isinstance(over, bool):
        return [(number, number) for number in range(min(over, MAX_STEPS + 1))]
    if over is None or over == "":
        return []
    raise TokenizerError(f"the template walks over {type(over).__name__}, which has no elements")


def _printed(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping | list | tuple):
        return _json(value)
    return str(value)


def _json(value: Any) -> str:
    """As Go writes it: no spaces, and what has a meaning in HTML escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _apply(function: str, values: list[Any]) -> Any:
    first: Any = values[0] if values else None
    if function == "not":
        return not first
    if function == "eq":
        return any(_equal(first, other) for other in values[1:])
    if function == "ne":
        return not _equal(first, values[1])
    if function in ("lt", "le", "gt", "ge"):
        second = values[1]
        return {"lt": first < second, "le": first <= second, "gt": first > second, "ge": first >= second}[function]
    if function == "len":
        return 0 if first is None else len(first)
    if function == "index":
        for key in values[1:]:
            first = first.get(key) if isinstance(first, Mapping) else _element(first, key)
        return first
    if function == "slice":
        low, high = values[1], values[2] if len(values) > 2 else len(first)
        if not 0 <= low <= high <= len(first):
            raise IndexError(f"{low} to {high} is outside of {len(first)}")
        return first[low:high]
    if function == "json":
        return _json(first)
    if function == "print":
        return "".join(map(_printed, values))
    day = datetime.date.today() - datetime.timedelta(days=function == "yesterdayDate")
    return day.isoformat()


def _equal(left: Any, right: Any) -> bool:
    """A value that is not there equals the empty one of its kind, as in Go."""
    if left is None or right is None:
        return not left and not right
    return bool(type(left) is type(right) and left == right)


def _element(values: Any, at: Any) -> Any:
    if not 0 <= at < len(values):
        raise IndexError(f"there is no element {at} of {len(values)}")
    return values[at]
