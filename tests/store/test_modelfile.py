"""The grammar of Modelfiles: what is read, where errors are, and that what is written is read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.core.errors import ConfigError
from nybble.store.modelfile import (
    INSTRUCTIONS,
    PARAMETERS,
    ROLES,
    Command,
    ModelfileError,
    format_modelfile,
    parse_modelfile,
    read_commands,
)

pytestmark = pytest.mark.unit


def test_everything_at_once() -> None:
    text = '''\ufeff# made by hand\r
from ./model.gguf\r
Adapter lora.safetensors
PARAMETER temperature 0.5
parameter STOP "<|end|>"
PARAMETER stop two words
PARAMETER num_ctx 4096
PARAMETER use_mmap false
TEMPLATE """{{ .Prompt }}
{{ .Response }}"""
SYSTEM first
    SYSTEM "He said "hi" to me"
MESSAGE User  What?
MESSAGE assistant """
That.
"""
LICENSE MIT
LICENSE """Two
lines"""'''
    read = parse_modelfile(text)
    assert read.source.value == "./model.gguf"
    assert [one.value for one in read.adapters] == ["lora.safetensors"]
    assert read.parameters == {
        "temperature": 0.5,
        "stop": ["<|end|>", "two words"],
        "num_ctx": 4096,
        "use_mmap": False,
    }
    assert read.template is not None
    assert read.template.value == "{{ .Prompt }}\n{{ .Response }}"
    assert (read.template.line, read.template.column) == (9, 10)
    assert read.system == 'He said "hi" to me'
    assert read.messages == (("user", "What?"), ("assistant", "\nThat.\n"))
    assert read.license == ("MIT", "Two\nlines")
    assert read.notes == ()


def test_what_has_no_effect_is_said() -> None:
    read = parse_modelfile("FROM x\nPARAMETER mirostat 2\nREQUIRES 0.14.0\nRENDERER qwen3\nPARSER qwen3\n")
    assert [note.split(" has ")[0] for note in read.notes] == ["PARAMETER mirostat", "REQUIRES", "RENDERER", "PARSER"]
    assert read.parameters == {}


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("", 1, 1, ["FROM is missing", "a line FROM"]),
        ("FROM x\nFORM y", 2, 1, ["'FORM'", "FROM, PARAMETER"]),
        ("FROM x\n\n  SYSTEM", 3, 9, ["SYSTEM has no value"]),
        ("FROM x\nFROM y", 2, 6, ["second FROM"]),
        ("FROM x\nPARAMETER temprature 1", 2, 11, ["'temprature'", "temperature"]),
        ("FROM x\nPARAMETER", 2, 10, ["missing"]),
        ("FROM x\nPARAMETER top_k 1.5", 2, 17, ["'1.5'", "a whole number"]),
        ("FROM x\nPARAMETER top_p inf", 2, 17, ["a number"]),
        ("FROM x\nPARAMETER use_mmap maybe", 2, 20, ["true or false"]),
        ("FROM x\nPARAMETER top_k", 2, 16, ["PARAMETER has no value", "after top_k"]),
        ("FROM x\nMESSAGE robot hi", 2, 9, ["'robot'", "system, user, assistant"]),
        ('FROM x\nSYSTEM """never\nclosed', 2, 8, ["never closed"]),
        ('FROM x\nSYSTEM "never', 2, 8, ["never closed"]),
        ("FROM x\nPARAMETER speculate perhaps", 2, 21, ["'perhaps'", "auto, off, ngram or draft=MODEL"]),
        ("just text", 1, 1, ["'just'"]),
    ],
)
def test_errors_say_where_and_what(text: str, line: int, column: int, words: list[str]) -> None:
    with pytest.raises(ModelfileError) as caught:
        parse_modelfile(text)
    error = caught.value
    assert (error.line, error.column) == (line, column)
    assert str(error).startswith(f"the Modelfile, line {line}, column {column}: ")
    assert all(word in str(error) for word in words)
    assert str(error.named("my/Modelfile")).startswith(f"my/Modelfile, line {line}, column {column}: ")


def test_a_very_long_file_is_read_in_no_time_or_refused() -> None:
    lines = "LICENSE x\n" * 200_000
    assert len(parse_modelfile("FROM x\n" + lines).license) == 200_000
    with pytest.raises(ModelfileError, match="characters"):
        parse_modelfile("FROM x\n" + "#" * (1 << 22))


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text('"" \n\r\t#a', max_size=20)


@st.composite
def commands(draw: st.DrawFn) -> Command:
    word = draw(st.sampled_from(INSTRUCTIONS))
    argument = ""
    if word == "PARAMETER":
        argument = draw(st.sampled_from(PARAMETERS))
    elif word == "MESSAGE":
        argument = draw(st.sampled_from(ROLES))
    return Command(word, draw(texts), argument)


@given(st.lists(commands(), max_size=6))
def test_what_is_written_is_read_back(lines: list[Command]) -> None:
    try:
        text = format_modelfile(lines)
    except ConfigError:
        ends = [line.rstrip(" \t\r") for one in lines for line in one.value.split("\n")[:-1]]
        assert any(end.endswith('"""') for end in ends)
        return
    found = [(one.word, one.argument, one.value) for one in read_commands(text)]
    assert found == [(one.word, one.argument, one.value) for one in lines]


@given(st.text(max_size=200) | st.text('FROM x"\n #PARAMETER', max_size=100))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read = parse_modelfile(text)
    except ModelfileError as error:
        assert 1 <= error.line <= text.count("\n") + 1
        assert error.column >= 1
    else:
        assert read.source.value is not None
