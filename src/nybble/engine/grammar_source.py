"""What a request asks for, as the text of a grammar that llguidance reads, checked as far as text can be."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from nybble.core.errors import ConfigError
from nybble.core.sampling import StructuredOutputsParams
from nybble.engine.json_schema import MAX_FORCED_CHARS, is_simple, prepare_schema
from nybble.engine.regex_rules import check_regex

MAX_SOURCE_CHARS = 1 << 20
MAX_RULE_CHARS = 1 << 16  # of a grammar, its JSON schemas not counted
MAX_CHOICES = 2048
MAX_CHOICE_CHARS = 1 << 16
MAX_NESTING = 50  # brackets in a Lark grammar
MAX_REPEAT = 10_000  # of a counted repeat in a Lark grammar
# Once between two parts of a JSON text: a space, or a line break with its indentation. Never without end.
_WHITESPACE = " |\n {0,64}|\n\t{0,16}"
# No \uXXXX: the compiler would let a name be written in a second way, past the schema of that name.
_ESCAPES = 'nrbtf\\"'
_JSON_OPTIONS = {
    "whitespace_pattern": _WHITESPACE,
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
    "json_allowed_escapes": _ESCAPES,
    "json_allow_general_unicode_escapes": False,
}
# Rules can force a text of any length, which would be computed anew at every step.
_NO_FORCING = '%llguidance {"no_forcing": true}\n'
_JSON = re.compile(r"%json\b\s*")
_REPEAT = re.compile(r"[{~]\s*(\d+)\s*(?:(?:,|\.\.)\s*(\d+)?)?")


@dataclass(frozen=True, slots=True)
class GrammarSource:
    """what: what the user gave, for messages. simple: compiling it is known to be cheap."""

    what: str
    text: str
    simple: bool


def grammar_source(params: StructuredOutputsParams) -> GrammarSource:
    """Raises ConfigError if the request is not usable: too large, too deeply nested, or not expressible."""
    if params.json is not None:
        return _from_schema(prepare_schema(params.json), "the JSON schema")
    if params.json_object:
        return _from_schema({"type": "object"}, "json_object")
    if params.regex is not None:
        check_regex(params.regex, "the regular expression")
        return GrammarSource("the regular expression", llguidance.LLMatcher.grammar_from_regex(params.regex), False)
    if params.choice is not None:
        return GrammarSource("the choice", llguidance.LLMatcher.grammar_from_regex(_choice(params.choice)), True)
    if params.grammar is not None:
        return GrammarSource("the grammar", _lark(params.grammar), False)
    raise ConfigError("structured outputs need one of json, json_object, regex, choice or grammar")


def _from_schema(schema: dict[str, Any], what: str) -> GrammarSource:
    text = json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": _JSON_OPTIONS}}]})
    return GrammarSource(what, text, is_simple(schema))


def _choice(choices: list[str]) -> str:
    if not choices or len(choices) > MAX_CHOICES or sum(map(len, choices)) > MAX_CHOICE_CHARS:
        raise ConfigError(
            f"choice must have 1 to {MAX_CHOICES} texts of at most {MAX_CHOICE_CHARS} characters together"
        )
    if not all(isinstance(choice, str) and 0 < len(choice) <= MAX_FORCED_CHARS for choice in choices):
        raise ConfigError(f"choice must be a list of texts of 1 to {MAX_FORCED_CHARS} characters")
    if any("\ud800" <= char <= "\udfff" for choice in choices for char in choice):
        raise ConfigError("choice holds a lone surrogate: it is not valid Unicode")
    return "|".join("".join(map(_literal, choice)) for choice in dict.fromkeys(choices))


def _literal(char: str) -> str:
    return char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}"


def _lark(source: str) -> str:
    if len(source) > MAX_SOURCE_CHARS:
        raise ConfigError(f"the grammar has {len(source)} characters, more than {MAX_SOURCE_CHARS}")
    if not source.strip() or source.lstrip().startswith("{"):
        raise ConfigError("the grammar must be written in Lark or GBNF, starting with a rule")
    try:
        source.encode()
        text: str = any_to_lark(source)
    except Exception as e:  # the converter raises what it likes
        raise ConfigError(f"the grammar cannot be read: {_one_line(e)}") from None
    return _NO_FORCING + _prepared(text)


def _prepared(text: str) -> str:
    """Every schema behind %json prepared like one that stands alone, and the rest checked."""
    rules, whole, at = "", "", 0
    while found := _JSON.search(text, at):
        try:
            schema, end = json.JSONDecoder().raw_decode(text, found.end())
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"the grammar has no JSON schema after %json: {_one_line(e)}") from None
        if not isinstance(schema, dict):
            raise ConfigError("the grammar has no JSON schema after %json")
        rules += text[at : found.end()]
        whole += text[at : found.end()] + json.dumps({**prepare_schema(schema), "x-guidance": _JSON_OPTIONS})
        at = end
    _check_rules(rules + text[at:])
    return whole + text[at:]


def _check_rules(rules: str) -> None:
    if len(rules) > MAX_RULE_CHARS:
        raise ConfigError(f"the grammar's rules have {len(rules)} characters, more than {MAX_RULE_CHARS}")
    depth = 0
    for char in rules:  # brackets in strings count too: no grammar needs so many
        depth += (char in "([{") - (char in ")]}" and depth > 0)
        if depth > MAX_NESTING:
            raise ConfigError(f"the grammar nests more than {MAX_NESTING} brackets")
    if any(int(count[:9] or "0") > MAX_REPEAT for counts in _REPEAT.findall(rules) for count in counts):
        raise ConfigError(f"the grammar repeats something more than {MAX_REPEAT} times")
    if re.search(r"\btemperature\s*=", rules):
        raise ConfigError("the grammar sets a temperature, which is not supported: use the request's temperature")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
