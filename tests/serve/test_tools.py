"""Tool calls: forced by a grammar, and read back out of text that arrives in pieces."""

from __future__ import annotations

import json
import random
import re

import pytest

from nybble.core.errors import ConfigError
from nybble.serve.openai.tool_parser import (
    ArgumentsDelta,
    CallStart,
    ContentDelta,
    ToolDelta,
    ToolParser,
    parse_tool_calls,
)
from nybble.serve.openai.tools import Tool, ToolFormat, detect_tool_format, forced_call

pytestmark = pytest.mark.unit
NAMES = ("weather", "get.time-2")
PARIS = '{"city": "Par\\"is}", "days": [1, {"x": 2}]}'
HERMES, LLAMA3, MISTRAL, JSON = ToolFormat.HERMES, ToolFormat.LLAMA3, ToolFormat.MISTRAL, ToolFormat.JSON


def call(name: str = "weather", arguments: str = PARIS, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def collect(deltas: list[ToolDelta]) -> tuple[str, list[tuple[str, str]]]:
    content = ""
    calls: list[list[str]] = []
    for delta in deltas:
        if isinstance(delta, ContentDelta):
            assert delta.text
            content += delta.text
        elif isinstance(delta, CallStart):
            assert delta.index == len(calls)
            calls.append([delta.name, ""])
        else:
            assert isinstance(delta, ArgumentsDelta) and delta.index == len(calls) - 1
            calls[-1][1] += delta.text
    return content, [(name, arguments) for name, arguments in calls]


def streamed(pieces: list[str], tool_format: ToolFormat, **options: bool) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolParser(tool_format, NAMES, **options)
    return collect([delta for piece in pieces for delta in parser.push(piece)] + parser.flush())


TWO = [("weather", PARIS), ("get.time-2", "{}")]
# format, text, content, calls: the same however the text is cut
CASES = [
    (HERMES, f"<tool_call>\n{call()}\n</tool_call>", "", TWO[:1]),
    (HERMES, f"<tool_call>{call()}</tool_call>\n<tool_call>{call('get.time-2', '{}')}</tool_call>", "", TWO),
    (HERMES, f"Let me look.\n\n<tool_call>\n{call()}\n</tool_call>\n done ", "Let me look.\n done", TWO[:1]),
    (HERMES, f"<tool_call>\n{call()}", "", TWO[:1]),  # cut before the end tag
    (HERMES, "a < b <tool_ <tool_calls> x", "a < b <tool_ <tool_calls> x", []),
    (HERMES, "<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
     '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', []),
    (HERMES, '<tool_call>{"name": "weather"', '<tool_call>{"name": "weather"', []),
    # Without the tag, as small models write calls: the answer starts with it, and it names a tool.
    (HERMES, call(), "", TWO[:1]),
    (HERMES, f"```json\n{call()}\n```", "", TWO[:1]),
    (HERMES, f"```\n{call()}\n```\n\n```json\n{call('get.time-2', '{}')}\n```", "", TWO),
    (HERMES, f"```json\n[{call()}, {call('get.time-2', '{}')}]\n``` so", " so", TWO),
    (HERMES, f"{call()}\n{call('get.time-2', '{}')}", "", TWO),
    (HERMES, f"{call()}\n</tool_call>", "", TWO[:1]),
    (HERMES, f"```json\n{call('unknown')}\n```", f"```json\n{call('unknown')}\n```", []),
    (HERMES, f"Look: ```json\n{call()}\n```", f"Look: ```json\n{call()}\n```", []),
    (HERMES, '```json\n{"answer": 1}\n```', '```json\n{"answer": 1}\n```', []),
    (HERMES, "```js\nx\n``` ``", "```js\nx\n``` ``", []),
    (HERMES, "``", "``", []),
    (HERMES, f'<tool_call>{{"arguments": {PARIS}, "name": "weather"}}</tool_call>', "", TWO[:1]),
    (HERMES, f'<tool_call>{{"name": "weather", "arguments": {PARIS}, "id": 3}}</tool_call> x', " x", TWO[:1]),
    (HERMES, "  plain text  ", "  plain text  ", []),
    (HERMES, "", "", []),
    (LLAMA3, call(key="parameters"), "", TWO[:1]),
    (LLAMA3, f"<|python_tag|>{call(key='parameters')}", "", TWO[:1]),
    (LLAMA3, f"{call(key='parameters')}; {call('get.time-2', '{}', 'parameters')}", "", TWO),
    (LLAMA3, f'{{"type": "function", "name": "weather", "parameters": {PARIS}}}', "", TWO[:1]),
    (LLAMA3, '{"answer": {"name": 1}}', '{"answer": {"name": 1}}', []),
    (LLAMA3, "[1, 2]", "[1, 2]", []),
    (LLAMA3, f"So: {call()}", f"So: {call()}", []),
    (MISTRAL, f"[TOOL_CALLS][{call()}, {call('get.time-2', '{}')}]", "", TWO),
    (MISTRAL, f"[TOOL_CALLS] [ {call()} ]", "", TWO[:1]),
    (MISTRAL, f"[{call()},{call('get.time-2', '{}')}]", "", TWO),  # control tokens are not shown
    (MISTRAL, f"[TOOL_CALLS]weather{PARIS}[TOOL_CALLS]get.time-2[ARGS]{{}}", "", TWO),
    (MISTRAL, "Sure.[TOOL_CALLS]what is this", "Sure.[TOOL_CALLS]what is this", []),
    (MISTRAL, "[1] is a list, [TOOL", "[1] is a list, [TOOL", []),
    (JSON, call(), "", TWO[:1]),
    (JSON, f"\n{call(key='parameters')}\n", "", TWO[:1]),
    (JSON, f"[{call()}, {call('get.time-2', '{}')}]", "", TWO),
    (JSON, f'{{"function": {call()}, "type": "function"}}', "", TWO[:1]),
    (JSON, '{"name": "weather", "arguments": "{\\"a\\": 1}"}', "", [("weather", '{"a": 1}')]),
    (JSON, '{"name": "weather", "arguments": 5}', '{"name": "weather", "arguments": 5}', []),
    (JSON, '{"name": "weather"}', "", [("weather", "{}")]),
    (JSON, "[]", "[]", []),
    (JSON, "[ ", "[ ", []),
    (JSON, "{" * 3000, "{" * 3000, []),
    (JSON, '{"name": ' + "[" * 3000 + "]" * 3000 + "}", '{"name": ' + "[" * 3000 + "]" * 3000 + "}", []),
]  # fmt: skip


@pytest.mark.parametrize(("tool_format", "text", "content", "calls"), CASES)
def test_calls_are_found_however_the_text_arrives(tool_format, text, content, calls):
    pick = random.Random(len(text))
    cuts = [[text], list(text)]
    for _ in range(5):
        at = sorted(pick.choices(range(len(text) + 1), k=4))
        cuts.append([text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)])
    for pieces in cuts:
        assert streamed(pieces, tool_format) == (content, calls)
    whole, found = parse_tool_calls(text, tool_format, NAMES)
    assert whole == content
    assert [(c.name, json.loads(c.arguments)) for c in found] == [(name, json.loads(args)) for name, args in calls]


def test_arguments_stream_before_they_are_complete():
    parser = ToolParser(HERMES, NAMES)
    assert parser.push("Hi <tool") == [ContentDelta("Hi")]
    assert parser.push('_call>{"name": "weather"') == []
    start, arguments = parser.push(', "arguments": {"city": "Pa')
    assert isinstance(start, CallStart) and start.name == "weather" and re.fullmatch(r"call_[0-9a-f]{24}", start.id)
    assert arguments == ArgumentsDelta(0, '{"city": "Pa')
    assert parser.push('ris"}') == [ArgumentsDelta(0, 'ris"}')]
    assert parser.push("}</tool_call>") + parser.flush() == []


def test_a_cut_call_is_content_of_a_whole_answer():
    text = '<tool_call>{"name": "weather", "arguments": {"city": "Pa'
    assert parse_tool_calls(text, HERMES, NAMES) == (text, [])


def test_without_parallel_calls_the_first_one_counts():
    text = "".join(f"<tool_call>{call()}</tool_call>" for _ in range(3)) + "and more"
    assert streamed(list(text), HERMES, parallel=False) == ("", TWO[:1])


def test_mistral_ids_are_what_its_templates_accept():
    _, calls = parse_tool_calls(f"[TOOL_CALLS][{call()}]", MISTRAL, NAMES)
    assert re.fullmatch("[A-Za-z0-9]{9}", calls[0].id)


@pytest.mark.parametrize("opening", ["", "```json", "```json\n["])
def test_much_white_space_is_read_once(opening):
    text = opening + " " * 200_000 + "x"  # its square would take minutes
    assert streamed([text], HERMES) == (text, [])


def test_no_text_whatever_raises():
    pick = random.Random(3)
    parts = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", "weather", '{"name"', ": ", '"',
             "weather", ', "arguments": ', "{", "}", "[", "]", ",", "\\", "\n", "x", '{"name": "weather"']  # fmt: skip
    for _ in range(3000):
        pieces = pick.choices(parts, k=pick.randrange(12))
        for tool_format in ToolFormat:
            parts_of_it = streamed(pieces, tool_format)
            assert streamed(["".join(pieces)], tool_format) == parts_of_it
            content, calls = parse_tool_calls("".join(pieces), tool_format, NAMES)
            assert all(json.loads(c.arguments) is not None for c in calls) and isinstance(content, str)


def test_the_format_is_read_off_the_template():
    assert detect_tool_format(None) is JSON
    assert detect_tool_format("{{ messages }}") is JSON
    assert detect_tool_format('within <tool_call></tool_call>:\n<tool_call>\n{"name"') is HERMES
    assert detect_tool_format("<tool_call>\n<function=example>") is JSON
    assert detect_tool_format("{{ bos }}[AVAILABLE_TOOLS]…[TOOL_CALLS]") is MISTRAL
    assert detect_tool_format("<|start_header_id|> … <|python_tag|>") is LLAMA3
    assert MISTRAL.shows_special_tokens and not HERMES.shows_special_tokens


def test_a_forced_call_needs_a_tool_that_exists():
    tools = [Tool("a"), Tool("b", {"type": "object"})]
    for arguments in ({"name": "c"}, {"tools": []}, {"tools": [Tool(f"t{i}") for i in range(200)]}):
        with pytest.raises(ConfigError):
            forced_call(arguments.pop("tools", tools), HERMES, **arguments)
    with pytest.raises(ConfigError, match="letters, digits"):
        Tool('a"b')
