"""Chat templates render as written, and a hostile one is stopped quickly with one sentence."""

from __future__ import annotations

import time

import pytest

from nybble.core.errors import TokenizerError
from nybble.tokenizer import ChatTemplate

pytestmark = pytest.mark.unit
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HI = [{"role": "user", "content": "<b>Hi</b>"}]


def render(source, messages=HI, **kw):
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, **kw)


def test_renders_a_conversation():
    assert render(CHATML) == "<|im_start|>user\n<b>Hi</b><|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == "<|im_start|>user\n<b>Hi</b><|im_end|>\n"


def test_what_templates_use():
    assert render("{{ bos_token }}{{ messages | length }}{{ eos_token }}") == "<s>1</s>"
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert (
        render("{% set ns = namespace(x=0) %}{% for i in range(5) %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}")
        == "10"
    )
    assert render("{% for i in range(9) %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ messages[0].content.replace('b', 'i') | trim }}") == "<i>Hi</i>"
    assert render("{{ ', '.join(['a', 'b']) ~ (['c'] | join) ~ 'x' * 3 }}") == "a, bcxxx"
    assert render("{{ messages[0].content.split('H')[1].strip() }}") == "i</b>"
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_a_refusal_is_the_templates_own_words():
    with pytest.raises(TokenizerError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "{{ 'a' * 1000000000 }}",
        "{{ [1] * 1000000000 }}",
        "{{ 9 ** 999999999 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ 'a'.center(999999999) }}",
        "{{ 'a' | center(999999999) }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x.replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x.join(n.x) %}{% endfor %}",
        "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ undefined_thing.x }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{% for",
        "(" * 10000 + "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "x" * (1 << 19),
    ],
)
def test_a_hostile_template_is_stopped(source):
    started = time.monotonic()
    with pytest.raises(TokenizerError):
        render(source)
    assert time.monotonic() - started < 10  # a hang, not a speed, is what this catches
