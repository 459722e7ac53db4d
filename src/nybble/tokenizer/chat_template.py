"""Chat templates: Jinja in a sandbox, because a template comes out of a file that somebody else made.

What a hostile template can do is bounded: Jinja's immutable sandbox keeps it away from Python's internals; every line
it runs checks a deadline; what multiplies text (`*`, `~`, `+`, `%`, padding, replacing, joining) checks the size of the
result first; source and output have limits.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nybble.core.errors import TokenizerError

MAX_SOURCE_CHARS = 1 << 18
MAX_OUTPUT_CHARS = 1 << 22
MAX_SECONDS = 2.0
# Padding to any width: nothing a chat needs, everything an attack on memory needs.
_WIDTH_METHODS = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate"))
_WIDTH_FILTERS = ("center", "format", "indent", "wordwrap", "pprint", "xmlattr", "urlize", "filesizeformat")


class _LimitError(Exception):
    """A template asked for more than it may have."""


def _check_size(size: int) -> None:
    if size > MAX_OUTPUT_CHARS:
        raise _LimitError(f"it builds a text of more than {MAX_OUTPUT_CHARS} characters")


def _size(value: object) -> int:
    if isinstance(value, str | bytes | list | tuple | dict):
        return len(value)
    return value.bit_length() // 4 if isinstance(value, int) else 16


def _concat(*parts: object) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _replace(text: object, old: str, new: str, count: int | None = None) -> str:
    text = str(text)
    limit = -1 if count is None else count
    hits = text.count(old) if limit < 0 else min(text.count(old), limit)
    _check_size(len(text) + hits * max(0, len(new) - len(old)))
    return text.replace(old, new, limit)


def _join(values: Iterable[object], d: str = "", attribute: str | None = None) -> str:
    items = list(values)
    if attribute is not None:
        items = [item.get(attribute, "") if isinstance(item, Mapping) else "" for item in items]
    texts = [str(item) for item in items]
    _check_size(sum(map(len, texts)) + len(d) * len(texts))
    return d.join(texts)


def _tojson(value: object, indent: int | None = None) -> str:
    """As chat templates expect it: no HTML escapes, no ASCII escapes."""
    if indent is not None:
        _check_size(indent * 16)
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: object) -> None:
    raise TokenizerError(f"the chat template refuses these messages: {message}")


def _strftime_now(pattern: str) -> str:
    _check_size(16 * len(pattern))
    return datetime.datetime.now().strftime(pattern)


class _CodeGenerator(CodeGenerator):
    """Sends `~` through a checked function: Jinja intercepts the other operators only."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.checked_concat(")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")")


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(("*", "**", "+", "%", "//"))
    checked_concat = staticmethod(_concat)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str | bytes)):
            raise _LimitError(f"it uses {operator!r}, which is not allowed")
        if operator == "*":
            both_numbers = isinstance(left, int | float) and isinstance(right, int | float)
            # Numbers of many digits cost time, long before they cost memory.
            times = (_size(left) + _size(right)) << 10 if both_numbers else _repeated(left, right)
            _check_size(times)
        if operator == "+":
            _check_size(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _WIDTH_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        """The sandbox would let `str.format` through, and with it any width."""
        name = getattr(value, "__name__", "")
        if isinstance(getattr(value, "__self__", None), str) and name in ("format", "format_map"):
            raise _LimitError(f"it uses str.{name}, which is not allowed")
        return None

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *args, **kwargs)
        if isinstance(owner, str) and name == "join":
            (values,) = args
            return _join(values, owner)
        return super().call(context, obj, *args, **kwargs)


def _repeated(left: object, right: object) -> int:
    sequence, count = (right, left) if isinstance(left, int) else (left, right)
    return _size(sequence) * (count if isinstance(count, int) else 1)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], keep_trailing_newline=False
    )
    for name in _WIDTH_FILTERS:
        del environment.filters[name]
    environment.filters |= {"tojson": _tojson, "replace": _replace, "join": _join}
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox caps it
        "namespace": environment.globals["namespace"],
        "dict": dict,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


class ChatTemplate:
    """A chat template, compiled once. Raises TokenizerError if it is too long or not valid Jinja."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise TokenizerError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE_CHARS}")
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError, ValueError) as e:
            raise TokenizerError(f"the chat template is not valid: {e}; give --raw to go without it") from e
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The conversation as the model reads it.

        Raises TokenizerError if the template refuses the messages, fails, or takes too much time or memory.
        """
        arguments = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": None}
        deadline = time.monotonic() + MAX_SECONDS

        def check_time(*_: object) -> Any:
            if time.monotonic() > deadline:
                raise _LimitError(f"it runs for more than {MAX_SECONDS:g} seconds")
            return check_time

        parts: list[str] = []
        length = 0
        before = sys.gettrace()
        sys.settrace(check_time)  # a loop that writes nothing can be stopped in no other way
        try:
            for part in self._template.generate({**arguments, **self._tokens, **variables}):
                length += len(part)
                _check_size(length)
                parts.append(part)
        except TokenizerError:
            raise
        except Exception as e:  # a template can raise anything
            raise TokenizerError(f"the chat template cannot be used: {e}; give --raw to go without it") from e
        finally:
            sys.settrace(before)
        return "".join(parts)
