"""Structured output: what is drawn under the mask keeps to what was asked for, and what cannot be kept is refused."""

from __future__ import annotations

import decimal
import io
import json
import random
import re
import time
from decimal import Decimal
from typing import Any

import jsonschema
import numpy as np
import pytest
import sentencepiece
from grammar_sampling import BOS, CORPUS, EOS, TURN, Walker, allowed, byte_level_tokenizer
from schema_cases import REALISTIC, Maker

from nybble.core.errors import ConfigError
from nybble.core.sampling import StructuredOutputsParams
from nybble.core.tokenizer_source import GgufTokenizer
from nybble.engine import grammar as grammar_module
from nybble.engine.grammar import GrammarCompiler, GrammarMatcher
from nybble.engine.json_schema import prepare_schema
from nybble.serve.openai.tool_parser import parse_tool_calls
from nybble.serve.openai.tools import Tool, ToolFormat, forced_call
from nybble.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.unit
PADDED = 40  # rows of the head past the tokenizer's ids


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + PADDED, frozenset({EOS}))


def matcher_of(compiler: GrammarCompiler, **params: Any) -> GrammarMatcher:
    return compiler.compile(StructuredOutputsParams(**params))


def accepts(tokenizer: Tokenizer, matcher: GrammarMatcher, text: str) -> bool:
    matcher = matcher.fork()
    return all(matcher.accept(i) for i in tokenizer.encode(text, add_special=False)) and matcher.accept(EOS)


def number(text: str) -> Decimal | float:
    """Exact, unless the exponent is beyond what decimals are for."""
    return Decimal(text) if len(text.lower().partition("e")[2]) < 5 else float(text)


def check_answers(tokenizer: Tokenizer, compiler: GrammarCompiler, schema: dict[str, Any], seed: int) -> None:
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    validator = kind(exact, format_checker=kind.FORMAT_CHECKER)
    start = matcher_of(compiler, json=schema)
    for i in range(2):
        text = Walker(tokenizer).text(start.fork(), random.Random(f"{seed} {i}"))
        value = json.loads(text, parse_float=number)
        with decimal.localcontext(prec=400):
            assert not [error.message for error in validator.iter_errors(value)], text


@pytest.mark.parametrize("block", range(10))
def test_every_answer_to_a_random_schema_validates(tokenizer, compiler, block):
    for seed in range(20 * block, 20 * block + 20):
        if seed == 74:
            continue  # 0.5 between 0.001 and 0.501: the compiler sees no multiple there, and refuses
        check_answers(tokenizer, compiler, Maker(seed).root(), seed)


@pytest.mark.parametrize("name", REALISTIC)
def test_every_answer_to_a_realistic_schema_validates(tokenizer, compiler, name):
    check_answers(tokenizer, compiler, REALISTIC[name], 1)


# What the compiler cannot express, or would express too loosely -> what the message names.
REFUSED = {
    "not": {"not": {"type": "null"}},
    "if": {"type": "object", "properties": {"a": {"if": {}, "then": {}}}},
    "contains": {"type": "array", "contains": {"type": "null"}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "dependencies": {"anyOf": [{"dependencies": {"a": ["b"]}}]},
    "unevaluatedProperties": {"$ref": "#/$defs/a", "$defs": {"a": {"unevaluatedProperties": False}}},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "x-guidance": {"x-guidance": {"lenient": True}, "not": {}},
    "$ref": {"$ref": "https://example.org/schema.json"},
    "#/$defs/gone": {"$ref": "#/$defs/gone"},
    "$id": {"properties": {"a": {"$id": "http://x.y/z", "$ref": "#/$defs/a", "$defs": {"a": {}}}}},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "format": {"type": "string", "format": "idn-email"},
    "look-around": {"type": "string", "pattern": "^(?=a)b"},
    "back-reference": {"type": "string", "pattern": r"^(a)\1$"},
    "&&": {"type": "string", "pattern": "[a-z&&[^b]]"},
    "minProperties": {"type": "object", "minProperties": 2},
    "minItems": {"type": "array", "minItems": 10**9},
    "minLength": {"type": "string", "minLength": 10**9},
    "const": {"const": 2**53 + 1},
    "control character": {"enum": ["a\x01b"]},
    "minimum": {"type": "integer", "minimum": 10**18},
    "multipleOf": {"type": "integer", "multipleOf": 999_999_937},
    "multipleOf must be above 0": {"multipleOf": 0},
    "no text matches": {"$ref": "#"},
    "Unsatisfiable": {"type": "object", "required": ["a"], "additionalProperties": False},
    "type is 'str'": {"type": "str"},
    "must be an object or a boolean": {"items": 3},
    "list of names": {"required": "a"},
    "object of schemas": {"properties": []},
    "list of schemas": {"anyOf": {}},
    "nested more than": json.loads('{"items": ' * 100 + "{}" + "}" * 100),
    "more than 262144": {"description": "x" * 300_000},
    "more than 5000 parts": {"anyOf": [{"minLength": i} for i in range(6000)]},
    "1 to 5000 values": {"enum": list(range(6000))},
    "more than 1000 names": {"properties": {f"p{i}": {} for i in range(1001)}},
    "lone surrogate": {"const": "\ud800"},
    "not valid JSON": {"const": float("nan")},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_by_name(compiler, name):
    with pytest.raises(ConfigError) as caught:
        matcher_of(compiler, json=REFUSED[name])
    message = re.sub(r"at #?\S*/(\w+) must", r"\1 must", str(caught.value)).replace("at #/type is", "type is")
    assert name in message and "\n" not in message and len(message) < 500


def test_a_schema_may_be_text(tokenizer, compiler):
    assert accepts(tokenizer, matcher_of(compiler, json='{"type": "integer"}'), "12")
    assert accepts(tokenizer, matcher_of(compiler, json="true"), '{"a": [1]}')
    for text in ("", "{", "[]", "7", "false", "[" * 100_000, '{"const": 1' + "0" * 5000 + "}", '{"const": NaN}'):
        with pytest.raises(ConfigError):
            matcher_of(compiler, json=text)


def test_a_name_cannot_be_written_in_a_second_way(tokenizer, compiler):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}}
    matcher = matcher_of(compiler, json=schema)
    assert accepts(tokenizer, matcher, '{"a": "x", "b": 1}')
    assert not accepts(tokenizer, matcher, '{"\\u0061": 5}')
    assert not accepts(tokenizer, matcher, '{"a": "x", "a": 5}')


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.25}, ["0.1", "0.25", "0.000001"], ["0", "0.0", "0.26", "-0"]),
        ({"minimum": -2.5, "exclusiveMaximum": -2}, ["-2.5", "-2.01"], ["-2", "-2.0", "-1"]),
        ({"minimum": 3, "exclusiveMinimum": True, "maximum": 3.5}, ["3.1"], ["3", "3.0"]),
        ({"minimum": 3, "exclusiveMinimum": False, "maximum": 3.5}, ["3", "3.5"], ["2.9"]),
        ({"exclusiveMinimum": 0}, ["1", "17.5"], ["0", "-1"]),
    ],
)
def test_open_bounds_are_open(tokenizer, compiler, bounds, inside, outside):
    matcher = matcher_of(compiler, json={"type": "number", **bounds})
    assert all(accepts(tokenizer, matcher, text) for text in inside)
    assert not any(accepts(tokenizer, matcher, text) for text in outside)


def test_white_space_has_an_end(tokenizer, compiler):
    matcher = matcher_of(compiler, json_object=True)
    assert accepts(tokenizer, matcher, '{"a": {\n    "b": [\n\t\t1,\n\t\t2 ]\n  }\n}')
    assert not accepts(tokenizer, matcher, '{  "a": 1}')
    assert not accepts(tokenizer, matcher, '{\n\n"a": 1}')
    assert not accepts(tokenizer, matcher, " {}") and not accepts(tokenizer, matcher, "{} ")
    assert not accepts(tokenizer, matcher, '{"a":\n' + " " * 65 + "1}")
    assert not accepts(tokenizer, matcher, "[]")


def test_dates_exist(tokenizer, compiler):
    matcher = matcher_of(compiler, json={"type": "string", "format": "date"})
    good = ["2024-02-29", "2000-02-29", "1999-12-31", "0001-01-01", "2023-02-28", "2010-10-10"]
    bad = ["2023-02-29", "1900-02-29", "0000-01-01", "2024-04-31", "2024-13-01"]
    assert [accepts(tokenizer, matcher, f'"{date}"') for date in [*good, *bad]] == [True] * 6 + [False] * 5


def test_choice_and_the_end(tokenizer, compiler):
    matcher = matcher_of(compiler, choice=["a", "ab", "näh 😀", "x.*|y", "a"])
    for text in ("a", "ab", "näh 😀", "x.*|y"):
        assert accepts(tokenizer, matcher, text)
    for text in ("", "b", "abb", "xx", "y"):
        assert not accepts(tokenizer, matcher, text)
    size = tokenizer.vocab_size + PADDED
    assert EOS not in allowed(matcher, size)
    assert matcher.accept(tokenizer.encode("a", add_special=False)[0]) and not matcher.is_finished()
    assert set(allowed(matcher, size)) == {EOS, tokenizer.encode("b", add_special=False)[0]}
    assert matcher.accept(tokenizer.encode("b", add_special=False)[0])
    assert matcher.is_finished() and allowed(matcher, size) == [EOS] and matcher.forced_tokens() == []
    assert not matcher.accept(5) and matcher.accept(EOS) and matcher.is_finished()


def test_regex(tokenizer, compiler):
    matcher = matcher_of(compiler, regex=r"\d{3}-\d{2,}")
    assert accepts(tokenizer, matcher, "123-4567") and not accepts(tokenizer, matcher, "123-4")
    anything = matcher_of(compiler, regex="(?s:.*)")
    ids = allowed(anything, tokenizer.vocab_size + PADDED)
    assert EOS in ids and TURN in ids and BOS not in ids
    assert max(ids) < tokenizer.vocab_size, "padding is never allowed"


@pytest.mark.parametrize(
    "regex",
    ["(", ")", "[", "a{3", "a{2,1}", "(?=a)", "(?<!a)b", r"(a)\1", r"\bx", "(?m)^a$", "(?-u:a)", "a{1000000}", "x^y",
     "(a{200}){200}", "(" * 60 + ")" * 60, "a" * 9000, "[a--b]", "[[a]]", "\ud800"],
)  # fmt: skip
def test_a_bad_or_costly_regex_is_refused_at_once(compiler, regex):
    before = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        matcher_of(compiler, regex=regex)
    assert "\n" not in str(caught.value) and time.monotonic() - before < 2


def test_lark_and_gbnf(tokenizer, compiler):
    lark = matcher_of(compiler, grammar='start: "<" NAME ">" %json {"type": "array", "items": {"type": "null"}}\n'
                      "NAME: /[a-z]+/")  # fmt: skip
    assert accepts(tokenizer, lark, "<abc>[null, null]") and not accepts(tokenizer, lark, "<abc>[1]")
    assert lark.forced_tokens() == []
    gbnf = matcher_of(compiler, grammar='root ::= "select " col\ncol ::= [a-z]+')
    assert accepts(tokenizer, gbnf, "select abc") and not accepts(tokenizer, gbnf, "select 1")


@pytest.mark.parametrize(
    "grammar",
    ["", "start", "start: start", 'start: "a', "start: b", '{"grammars": []}', "start: " + "(" * 99 + '"a"' + ")" * 99,
     'start: "a"{1000000}', 'start: %json {"not": {}}', "start: %json", 'start: %json {"x-guidance": {}}',
     'start: a\na[temperature=0.5]: "x"', 'root ::= "a', "x" * 70_000, 'start: "\ud800"'],
)  # fmt: skip
def test_a_bad_grammar_is_refused(compiler, grammar):
    with pytest.raises(ConfigError) as caught:
        matcher_of(compiler, grammar=grammar)
    assert "\n" not in str(caught.value)


def test_schemas_that_multiply_are_stopped(compiler):
    """Each level holds two merged copies of the next: 2 ** 30 in all, from three kilobytes."""
    levels = {
        f"d{i}": {
            "properties": {name: {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"minProperties": 0}]} for name in "ab"}
        }
        for i in range(30)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": {**levels, "d30": {"type": "object"}}}
    with pytest.raises(ConfigError, match="too costly"):
        matcher_of(compiler, json=schema)


def test_hostile_expressions_stay_cheap_while_they_run(tokenizer, compiler):
    for regex in (r".*a.{20}", r"(x+x+)+y", r"(a?){3000}a", r"(a|aa)*b(.|..){500}c", r"\w{1,8000}", "a{9000}b"):
        matcher = matcher_of(compiler, regex=regex)
        mask = np.empty((tokenizer.vocab_size + PADDED + 31) // 32, np.uint32)
        pick = random.Random(1)
        before = time.monotonic()
        for _ in range(20):
            matcher.fill_mask(mask)
            ids = [i for i in allowed(matcher, tokenizer.vocab_size + PADDED) if i != EOS]
            if not ids:
                break
            assert matcher.accept(pick.choice(ids))
        assert time.monotonic() - before < 2


def test_forks_go_their_own_ways(tokenizer, compiler):
    matcher = matcher_of(compiler, choice=["abc", "xyz"])
    a, x = (tokenizer.encode(char, add_special=False)[0] for char in "ax")
    fork = matcher.fork()
    assert matcher.accept(a) and fork.accept(x)
    assert tokenizer.decode(matcher.forced_tokens()) == "bc" and tokenizer.decode(fork.forced_tokens()) == "yz"
    assert not matcher.accept(x) and matcher.accept(tokenizer.encode("b", add_special=False)[0])


def test_what_is_not_allowed_changes_nothing(tokenizer, compiler):
    matcher = matcher_of(compiler, choice=["ab"])
    for token_id in (-1, BOS, EOS, tokenizer.vocab_size, tokenizer.vocab_size + PADDED, 10**9):
        assert not matcher.accept(token_id)
    assert accepts(tokenizer, matcher, "ab")


def test_several_end_tokens_and_none(tokenizer):
    both = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({BOS, EOS})).compile(
        StructuredOutputsParams(regex="a?")
    )
    assert {BOS, EOS} <= set(allowed(both, tokenizer.vocab_size)) and both.accept(BOS)
    for size in (tokenizer.vocab_size, (tokenizer.vocab_size + 31) // 32 * 32):
        endless = GrammarCompiler(tokenizer, size, frozenset()).compile(StructuredOutputsParams(choice=["a"]))
        (a,) = allowed(endless, size)
        assert tokenizer.token_bytes(a) == b"a" and endless.accept(a)
        assert endless.is_finished() and allowed(endless, size) == []


def test_compiling_again_is_a_copy(tokenizer, monkeypatch):
    monkeypatch.setattr(grammar_module, "CACHED_GRAMMARS", 2)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({EOS}))
    calls = []
    build = compiler._build
    monkeypatch.setattr(compiler, "_build", lambda source: calls.append(source.text) or build(source))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for params in ({"json": schema}, {"json": json.dumps(schema)}, {"choice": ["a"]}, {"json": schema}):
        matcher_of(compiler, **params)
    assert len(calls) == 3 - 1
    matcher_of(compiler, choice=["b"])
    matcher_of(compiler, choice=["a"])
    assert len(calls) == 4, "the least recently used one was dropped"


def test_preparing_does_not_touch_the_callers_schema():
    schema = {"type": "string", "format": "date", "maxLength": 10**9}
    prepared = prepare_schema(schema)
    assert schema == {"type": "string", "format": "date", "maxLength": 10**9}
    assert "format" not in prepared and prepared["maxLength"] < 10**9


DOG = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}


def closed(schema):
    return prepare_schema(schema).get("additionalProperties") is False


def test_an_object_has_the_properties_that_are_named():
    assert closed(DOG)
    for own in ({"additionalProperties": True}, {"patternProperties": {"^x": {}}}):
        assert not closed({**DOG, **own}), "the schema says itself what else there may be"
    assert not closed({**DOG, "required": ["name", "age"]}), "there would be no such object"
    assert not closed({**DOG, "minProperties": 2}), "there would be no such object"
    assert not closed({"type": "object"}) and not closed({"type": "object", "properties": {}})
    union = prepare_schema({"anyOf": [DOG, {"$ref": "#/$defs/cat"}], "$defs": {"cat": DOG}})
    assert all(part["additionalProperties"] is False for part in (union["anyOf"][0], union["$defs"]["cat"]))


@pytest.mark.parametrize("merged", [{"allOf": [DOG]}, {"anyOf": [DOG]}, {"$ref": "#/$defs/dog"}])
def test_parts_of_one_object_stay_open(merged):
    schema = prepare_schema({"properties": {"age": {"type": "integer"}}, "$defs": {"dog": DOG}, **merged})
    assert "additionalProperties" not in json.dumps(schema)


def test_sentencepiece_with_byte_fallback():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 8), model_writer=model, model_type="bpe", vocab_size=360, byte_fallback=True,
        character_coverage=0.98, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1
             for i in range(pieces.get_piece_size())]  # fmt: skip
    tokenizer = load_tokenizer(
        GgufTokenizer(
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in range(len(kinds))],
                "tokenizer.ggml.scores": [pieces.get_score(i) for i in range(len(kinds))],
                "tokenizer.ggml.token_type": kinds,
                "tokenizer.ggml.bos_token_id": 1,
                "tokenizer.ggml.eos_token_id": 2,
                "tokenizer.ggml.unknown_token_id": 0,
            }
        )
    )
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({2}))
    matcher = compiler.compile(StructuredOutputsParams(choice=["naïve 語 {x}"]))
    token_ids: list[int] = []
    while not matcher.is_finished():
        ids = [i for i in allowed(matcher, tokenizer.vocab_size) if i != 2]
        token_ids.append(ids[-1])
        assert matcher.accept(ids[-1])
    assert b"".join(map(tokenizer.token_bytes, token_ids)).decode() == "naïve 語 {x}"
    fresh = compiler.compile(StructuredOutputsParams(choice=["naïve 語 {x}"]))
    assert b"".join(map(tokenizer.token_bytes, fresh.forced_tokens())).decode() == "naïve 語 {x}"
    start = compiler.compile(StructuredOutputsParams(json=REALISTIC["classification"]))
    walker_ids: list[int] = []
    pick = random.Random(4)
    while not start.is_finished():
        ids = [i for i in allowed(start, tokenizer.vocab_size) if i != 2]
        walker_ids.append(pick.choice(ids))
        assert start.accept(walker_ids[-1]) and len(walker_ids) < 3000
    jsonschema.validate(json.loads(tokenizer.decode(walker_ids)), REALISTIC["classification"])


@pytest.mark.parametrize("tool_format", list(ToolFormat))
@pytest.mark.parametrize("parallel", [False, True])
def test_a_forced_call_is_one_that_is_read_back(tokenizer, compiler, tool_format, parallel):
    reference = {
        "type": "object",
        "description": 'says %json {"not": 1}, temperature = 3, {99999} and ' + "(" * 99,
        "properties": {"a": {"$ref": "#/$defs/x"}},
        "required": ["a"],
        "$defs": {"x": {"type": "integer"}},
    }
    tools = [Tool("look-up", reference), Tool("now"), Tool("add.all", {"properties": {"x": {"type": "number"}}})]
    schemas = {"look-up": reference, "now": {"maxProperties": 0}, "add.all": {"type": "object"}}
    for seed in range(4):
        name = "look-up" if seed == 0 else None
        params = forced_call(tools, tool_format, name=name, parallel=parallel)
        text = Walker(tokenizer).text(compiler.compile(params), random.Random(seed))
        content, calls = parse_tool_calls(text, tool_format, schemas)
        assert content == "" and calls, text
        assert parallel or len(calls) == 1
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
            assert name in (None, call.name)
