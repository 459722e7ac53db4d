"""Go templates: what Go writes, this writes; what is not supported is refused by name; nothing runs away."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.core.errors import TokenizerError
from nybble.store import GoTemplate, is_go_template
from nybble.store.template import check_template

pytestmark = pytest.mark.unit

CHATML = """{{- range $i, $m := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ if .Content }}{{ .Content }}
{{- else if .ToolCalls }}<tool_call>
{{ range .ToolCalls }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
{{ end }}</tool_call>
{{- end }}{{ if not $last }}<|im_end|>
{{ end }}
{{- else if eq .Role "tool" }}<tool>{{ .Content }}</tool>
{{ end }}
{{- if and (ne .Role "assistant") $last }}<|im_start|>assistant
{{ end }}
{{- end }}"""
TURNS = """{{ if .System }}<|system|>
{{ .System }}<|end|>
{{ end }}{{ if .Prompt }}<|user|>
{{ .Prompt }}<|end|>
{{ end }}<|assistant|>
{{ .Response }}<|end|>
"""
CONVERSATION = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "more"},
]


def show(source: str, **variables: Any) -> str:
    """A template without turns, over what `.Messages` and `.Tools` are."""
    messages = variables.pop("messages", [{"role": "user", "content": "hi"}])
    return GoTemplate(source + "{{ if false }}{{ .Messages }}{{ end }}").render(messages, **variables)


def test_a_template_over_messages() -> None:
    call = {"function": {"name": "add", "arguments": {"b": 2, "a": "<1>"}}}
    messages = [
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    assert GoTemplate(CHATML).render(messages) == (
        "<|im_start|>user\n1+2?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"b":2,"a":"\\u003c1\\u003e"}}\n</tool_call>'
        "<|im_end|>\n<tool>3</tool>\n<|im_start|>assistant\n"
    )


def test_an_answer_that_was_begun_is_continued() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Once"}]
    assert GoTemplate(CHATML).render(messages) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nOnce"


def test_a_template_for_turns_ends_where_the_answer_begins() -> None:
    assert GoTemplate(TURNS).render(CONVERSATION) == (
        "<|system|>\nbe brief<|end|>\n<|user|>\nhi<|end|>\n<|assistant|>\nyo<|end|>\n"
        "<|user|>\nmore<|end|>\n<|assistant|>\n"
    )


def test_a_template_without_a_place_for_answers_gets_one() -> None:
    assert GoTemplate("[{{ .Prompt }}]").render(CONVERSATION[1:]) == "[hi]yo[more]"


def test_neighbours_with_the_same_role_become_one() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert show("{{ range .Messages }}<{{ .Content }}>{{ end }}", messages=messages) == "<a\n\nb>"


def test_a_suffix_is_filled_in() -> None:
    template = GoTemplate("<PRE>{{ .Prompt }}<SUF>{{ .Suffix }}<MID>{{ .Response }}")
    assert (
        template.render([{"role": "user", "content": "def f("}], suffix="return 1") == "<PRE>def f(<SUF>return 1<MID>"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a {{- /* comment */ -}} b", "ab"),
        ("a {{/* c */}} b", "a  b"),
        ("{{ `raw \\n` }}{{ \"tab\\t\" }}", "raw \\ntab\t"),
        ("{{ 3 }} {{ -1.5 }} {{ true }} {{ nil }}", "3 -1.5 true "),
        ("{{ $x := 1 }}{{ if true }}{{ $x = 2 }}{{ end }}{{ $x }}", "2"),
        ("{{ $x := 1 }}{{ if true }}{{ $x := 2 }}{{ end }}{{ $x }}", "1"),
        ("{{ with .Suffix }}{{ . }}{{ else }}none{{ end }}", "none"),
        ("{{ with $y := 5 }}{{ . }}{{ $y }}{{ end }}", "55"),
        ("{{ range $i, $t := .Tools }}{{ $i }}{{ $t.Name }}{{ else }}empty{{ end }}", "0a1b"),
        ("{{ range .Tools }}{{ if eq .Name `b` }}{{ break }}{{ end }}{{ .Name }}{{ end }}", "a"),
        ("{{ range .Tools }}{{ if eq .Name `a` }}{{ continue }}{{ end }}{{ .Name }}{{ end }}", "b"),
        ("{{ range $k, $v := (index .Tools 0).Properties }}{{ $k }}={{ $v.Type }};{{ end }}", "x=int;y=str;"),
        ("{{ (index .Tools 1).Name }}{{ len .Tools }}{{ len (slice .Tools 1) }}", "b21"),
        ("{{ .Tools | len | eq 2 }}{{ eq 3 1 2 3 }}{{ ne 1 2 }}{{ lt 1 2 }}{{ ge 2 2 }}", "truetruetruetruetrue"),
        ("{{ and 1 0 2 }}{{ or `` `x` }}{{ not nil }}{{ and .System .Prompt }}", "0xtrue"),
        ("{{ json (index .Tools 1) }}", '{"name":"b"}'),
        ("{{ print 1 `a` }}", "1a"),
        ("{{ if .System }}no{{ else if .Prompt }}no{{ else }}yes{{ end }}", "yes"),
        ("{{ $.Messages | len }}", "1"),
        ("{ not an action }", "{ not an action }"),
        ("{{ `}}` }}", "}}"),
    ],
)  # fmt: skip
def test_as_go_does_it(source: str, expected: str) -> None:
    tools = [{"name": "a", "properties": {"y": {"type": "str"}, "x": {"type": "int"}}}, {"name": "b"}]
    assert show(source, tools=tools) == expected


def test_the_date() -> None:
    today = datetime.date.today()
    text = show("{{ currentDate }} {{ yesterdayDate }}")
    assert text in {f"{day} {day - datetime.timedelta(days=1)}" for day in (today, datetime.date.today())}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ .Prompt | upper }}", "upper is not supported"),
        ("{{ printf `%s` .Prompt }}", "printf is not supported"),
        ("{{ template `x` }}", "template is not supported"),
        ("{{ define `x` }}", "define is not supported"),
        ("{{ .Secret }}", r"\.Secret is not something"),
        ("{{ .Prompt", "does not end"),
        ("{{ `open }}", "does not end"),
        ("{{ if .Prompt }}", "lacks an"),
        ("{{ end }}", "where nothing is open"),
        ("{{ if .Prompt }}{{ else }}{{ else }}{{ end }}", "where nothing is open"),
        ("{{ len }}", "len cannot take 0 values"),
        ("{{ }}", "a value is missing"),
        ("{{ .Prompt .System }}", "was not expected"),
        ("{{ (.Prompt }}", "parenthesis"),
        ("{{ .Prompt ? }}", "is not part of"),
        ("{{ 1 | 2 }}", "cannot be piped"),
        ("{{ \"\\q\" }}", "escape"),
        ("{{ if .Prompt }}" * 100, "nests more than"),
        ("{{ " + "(" * 100, "does not end"),
        ("{{ " + "(" * 100 + " }}", "nested too deeply"),
        ("x" * (1 << 18) + "y", "characters"),
    ],
)  # fmt: skip
def test_what_is_refused_when_it_is_read(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        GoTemplate(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ $x }}", "never set"),
        ("{{ break }}", "outside of a range"),
        ("{{ index .Messages 5 }}", "no element 5"),
        ("{{ slice .Messages 2 1 }}", "slice fails"),
        ("{{ lt 1 `a` }}", "lt fails"),
        ("{{ len 5 }}", "len fails"),
        ("{{ range true }}{{ end }}", "no elements"),
        ("{{ (index .Messages 0).Content.Name }}", "has no fields"),
        ("{{ range 999999 }}{{ range 999999 }}{{ end }}{{ end }}", "steps"),
        ("{{ range 99999 }}" + "x" * 200 + "{{ end }}", "characters"),
    ],
)
def test_what_fails_when_it_runs(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        show(source)


def test_messages_that_are_nested_deeply() -> None:
    deep: Any = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(TokenizerError, match="nested too deeply"):
        show("{{ .Tools }}", tools=[deep])


@given(st.text(max_size=80) | st.text('{}.$|()-= "`ifrangeodPromptMsl', max_size=60))
def test_any_text_is_a_template_or_refused(text: str) -> None:
    try:
        template = GoTemplate(text)
        template.render([{"role": "user", "content": "hi"}])
    except TokenizerError as error:
        assert "\n" not in str(error) or "\n" in text


@pytest.mark.parametrize(
    ("source", "is_go"),
    [
        (CHATML, True),
        (TURNS, True),
        ("{{ .Prompt }}", True),
        ("{{- json .Tools }}", True),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{{ messages[0].content }}", False),
        ("{{ bos_token }}{{ messages[0]['content'] }}", False),
        ("no actions", False),
    ],
)
def test_which_language_it_is(source: str, is_go: bool) -> None:
    assert is_go_template(source) == is_go
    check_template(source)
