"""Guesses at a JSON text: its keys and its layout come in few steps, and nothing but the number of steps changes."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from engine.grammar_sampling import EOS, allowed, byte_level_tokenizer
from fakes import FakeModel, FakeTokenizer
from nybble.core.sampling import SamplingParams, StructuredOutputsParams
from nybble.engine.core import EngineCore
from nybble.engine.grammar import GrammarCompiler, GrammarMatcher
from nybble.engine.speculation.lookup import Lookup
from nybble.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

PERSON = {
    "type": "object",
    "properties": {"first_name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["first_name", "age", "city"],
    "additionalProperties": False,
}
PEOPLE = {"type": "array", "items": PERSON, "minItems": 3, "maxItems": 3}
VALUE = [
    {"first_name": "Ada", "age": 36, "city": "London"},
    {"first_name": "Bo \"}, é", "age": 5, "city": ""},
    {"first_name": "Cy", "age": 70, "city": "Rome"},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, frozenset({EOS}))


def matcher_of(compiler: GrammarCompiler, **params: Any) -> GrammarMatcher:
    return compiler.compile(StructuredOutputsParams(**params))


def walk(matcher: GrammarMatcher, ids: list[int]) -> tuple[int, int, int]:
    """Steps that a text takes if each keeps the guesses that were right, then right guesses and wrong ones."""
    at = steps = right = wrong = 0
    while at < len(ids):
        guesses = matcher.likely_tokens(24) if at else []
        good = 0
        while good < len(guesses) and ids[at + good : at + good + 1] == [guesses[good]]:
            good += 1
        assert all(matcher.accept(i) for i in ids[at : at + good + 1])
        at, steps = at + good + 1, steps + 1
        right, wrong = right + good, wrong + len(guesses) - good
    return steps, right, wrong


@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"indent": "\t"}, {"separators": (",", ":")}], ids=str)
def test_keys_and_layout_take_no_steps_of_their_own(tokenizer, compiler, style) -> None:
    text = json.dumps(VALUE, ensure_ascii=False, **style)
    matcher = matcher_of(compiler, json=PEOPLE)
    ids = tokenizer.encode(text, add_special=False)
    steps, right, wrong = walk(matcher, ids)
    assert matcher.is_finished() or matcher.accept(EOS)
    values = [tokenizer.encode(f'{value}",\n', add_special=False) for one in VALUE for value in one.values()]
    assert steps <= sum(map(len, values)) + 4  # what a schema cannot know
    assert right >= len(ids) * 0.55 and wrong <= 8


def test_guesses_leave_the_matcher_as_it_is(tokenizer, compiler) -> None:
    matcher = matcher_of(compiler, json=PEOPLE)
    for token_id in tokenizer.encode('[\n  {\n    "first_name": "Ada"', add_special=False):
        before = allowed(matcher, tokenizer.vocab_size)
        assert matcher.likely_tokens(24) == matcher.likely_tokens(24)
        assert matcher.likely_tokens(3) == matcher.likely_tokens(24)[:3] and matcher.likely_tokens(0) == []
        assert allowed(matcher, tokenizer.vocab_size) == before
        assert matcher.accept(token_id)
    assert tokenizer.decode(matcher.likely_tokens(24)).startswith(',\n    "age": ')
    fork = matcher.fork()
    for token_id in tokenizer.encode(' ,"age":', add_special=False):
        assert fork.accept(token_id)
    assert tokenizer.decode(matcher.likely_tokens(24)).startswith(',\n    "age": ')


def test_nothing_is_guessed_where_there_is_a_choice(tokenizer, compiler) -> None:
    either = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    matcher = matcher_of(compiler, json=either)
    for token_id in tokenizer.encode("{", add_special=False):
        assert matcher.accept(token_id)
    assert matcher.likely_tokens(24) == []
    for params in ({"json_object": True}, {"regex": "[a-z]{3}x+"}, {"choice": ["abc", "abd"]}):
        assert matcher_of(compiler, **params).likely_tokens(24) in ([], tokenizer.encode("{", add_special=False))


def test_an_enormous_name_is_cheap_to_guess_at(tokenizer, compiler) -> None:
    name = "n" * 4000
    schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
    matcher = matcher_of(compiler, json=schema)
    for token_id in tokenizer.encode('{ "', add_special=False):
        assert matcher.accept(token_id)
    begin = time.monotonic()
    for _ in range(20):
        assert len(matcher.likely_tokens(24)) == 24
    assert time.monotonic() - begin < 2


class Written:
    """A matcher that allows everything and guesses 10, 11, 12, ..."""

    def fill_mask(self, out) -> None:
        out[:] = 0xFFFFFFFF

    def accept(self, token_id: int) -> bool:
        return True

    def is_finished(self) -> bool:
        return False

    def forced_tokens(self) -> list[int]:
        return []

    def likely_tokens(self, limit: int) -> list[int]:
        return list(range(10, 10 + limit))

    def fork(self) -> Written:
        return self


def test_a_layout_that_is_guessed_wrongly_counts_less_and_less() -> None:
    core = EngineCore(
        FakeModel(), FakeTokenizer(), context=256, vocab_size=97, num_blocks=64, max_num_seqs=8,
        compile_grammar=lambda params: Written(),
    )  # fmt: skip
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="x"))
    request = core.make_request("a", [1, 2, 3], params)
    (sequence,) = request.sequences
    lookup = Lookup()
    (draft,) = lookup.draft([sequence], [8], 0.0)
    assert draft.tokens == list(range(10, 18)) and not draft.is_forced
    for _ in range(20):
        lookup.learn(sequence, draft, 8, 0)
    (later,) = lookup.draft([sequence], [8], 0.0)
    assert later.chances[0] < 0.3 < draft.chances[0]
    sequence.token_ids += [1, 2, 3, 4, 1, 2, 3]  # what followed before is the better guess now
    (repeated,) = lookup.draft([sequence], [8], 0.0)
    assert list(repeated.tokens[:1]) == [4]
