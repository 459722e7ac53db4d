"""Structured output: which tokens may come next so that the text keeps to a schema, a regex, a choice or a grammar.

The work is llguidance's; this module bounds what a request can make it do, and gives its matchers the shape that the
engine needs. `compile` may take a while (the first call builds the vocabulary, about a second): call it outside of the
loop that serves tokens; compiling the same parameters again is then a copy.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict

import llguidance
import numpy as np
import numpy.typing as npt

from nybble.core.errors import ConfigError
from nybble.core.sampling import StructuredOutputsParams
from nybble.engine.grammar_guess import likely_tokens
from nybble.engine.grammar_probe import check_cost
from nybble.engine.grammar_source import GrammarSource, grammar_source
from nybble.engine.grammar_vocabulary import GrammarVocabulary, build_vocabulary
from nybble.engine.json_layout import JsonLayout
from nybble.tokenizer import Tokenizer

Bitmask = npt.NDArray[np.uint32]

CACHED_GRAMMARS = 64
# A lexer state takes 1 to 2 kB and every character of a bounded string makes one. What one step may cost (the other
# limits of llguidance: 200,000 units of lexer work, 50,000 parser items) is below 20 ms.
_LIMITS = llguidance.LLParserLimits(max_lexer_states=30_000, verbose_errors=False)


class GrammarCompiler:
    """Makes matchers for one model. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        """vocab_size: width of the model's head; ids past the tokenizer's own are never allowed."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._vocabulary: GrammarVocabulary | None = None
        self._compiled: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()

    def compile(self, params: StructuredOutputsParams) -> GrammarMatcher:
        """A matcher at the start of a text.

        Raises ConfigError if the schema, regular expression, choice or grammar is not valid, cannot be expressed, has
        no answer at all, or is too costly.
        """
        key = _key(params)
        with self._lock:
            matcher = self._compiled.get(key)
            if matcher is not None:
                self._compiled.move_to_end(key)
        if matcher is None:
            matcher = self._build(grammar_source(params))
            with self._lock:
                self._compiled[key] = matcher
                while len(self._compiled) > CACHED_GRAMMARS:
                    self._compiled.popitem(last=False)
        layout = JsonLayout() if key[0] in ("json", "json_object") else None
        return GrammarMatcher(matcher.deep_copy(), self._shared_vocabulary(), layout)

    def _build(self, source: GrammarSource) -> llguidance.LLMatcher:
        if not source.simple:
            check_cost(source.text, source.what)
        vocabulary = self._shared_vocabulary()
        matcher = llguidance.LLMatcher(vocabulary.guidance, source.text, log_level=0, limits=_LIMITS)
        loosened = [] if matcher.is_error() else matcher.get_grammar_warnings()
        if loosened:
            raise ConfigError(f"{source.what} cannot be kept to exactly: {_reason(loosened[0])}")
        trial = GrammarMatcher(matcher.deep_copy(), vocabulary)
        try:
            trial.fill_mask(np.empty((self._vocab_size + 31) // 32, np.uint32))
        except ConfigError:
            raise ConfigError(f"{source.what} cannot be used: {_reason(matcher.get_error())}") from None
        return matcher

    def _shared_vocabulary(self) -> GrammarVocabulary:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = build_vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids)
            return self._vocabulary


class GrammarMatcher:
    """The state of one sequence. Used by one thread at a time."""

    def __init__(
        self, matcher: llguidance.LLMatcher, vocabulary: GrammarVocabulary, layout: JsonLayout | None = None
    ) -> None:
        """layout: of a JSON text, to guess by; it is this matcher's own."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._layout = layout
        # Without an end token, llguidance's vocabulary has one more than ours: a mask of its own holds that bit.
        words = (vocabulary.size + (not vocabulary.eos_token_ids) + 31) // 32
        self._scratch = np.zeros(words, np.uint32)

    def fill_mask(self, out: Bitmask) -> None:
        """Writes which tokens may come next: bit i of the mask (uint32 [ceil(vocab_size / 32)]) is token i.

        The mask is empty only if the text is complete and the model has no token for the end.
        Raises ConfigError if the grammar became too costly, or no token can continue the text.
        """
        self._matcher.unsafe_compute_mask_ptr(self._scratch.ctypes.data, self._scratch.nbytes)
        if self._matcher.is_error():
            raise ConfigError(f"the grammar allows no further token: {_reason(self._matcher.get_error())}")
        out[:] = self._scratch[: len(out)]
        size = self._vocabulary.size
        if not self._vocabulary.eos_token_ids and size % 32:
            out[-1] &= np.uint32((1 << size % 32) - 1)

    def accept(self, token_id: int) -> bool:
        """Moves on by one token; False, and nothing changes, if the grammar does not allow it."""
        if not 0 <= token_id < self._vocabulary.size:
            return False
        if self._matcher.is_stopped():
            return not self._matcher.is_error() and token_id in self._vocabulary.eos_token_ids
        if self._matcher.try_consume_tokens([token_id]) != 1:
            return False
        if self._layout is not None:
            self._layout.feed(self._vocabulary.tokens[token_id])
        return True

    def is_finished(self) -> bool:
        """Whether the text is complete and only an end token may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def fork(self) -> GrammarMatcher:
        """A copy that moves on by itself."""
        layout = None if self._layout is None else self._layout.copy()
        return GrammarMatcher(self._matcher.deep_copy(), self._vocabulary, layout)

    def forced_tokens(self) -> list[int]:
        """The tokens that must follow, [] if there is a choice (or the end) next."""
        return [] if self._matcher.is_stopped() else list(self._matcher.compute_ff_tokens())

    def likely_tokens(self, limit: int) -> list[int]:
        """At most so many tokens that probably follow: forced ones, and the white space that JSON leaves free."""
        if self._layout is None or self._matcher.is_stopped():
            return []
        return likely_tokens(self._matcher, self._vocabulary, self._layout, limit)


def _key(params: StructuredOutputsParams) -> tuple[str, str]:
    if params.json is not None:
        try:
            return "json", params.json if isinstance(params.json, str) else json.dumps(params.json)
        except (TypeError, ValueError, RecursionError) as e:
            raise ConfigError(f"the JSON schema is not valid JSON: {_reason(e)}") from None
    if params.choice is not None:
        return "choice", json.dumps(params.choice)
    if params.regex is not None:
        return "regex", params.regex
    return ("grammar", params.grammar) if params.grammar is not None else ("json_object", str(params.json_object))


def _reason(error: object) -> str:
    """One line of llguidance's message, in our words where its own name its options."""
    text = str(error).split("<non-verbose/>")[0].split("<backtrace>")[0]
    text = " ".join(text.split())
    if "oneOf" in text:
        return "the alternatives of oneOf may overlap: use anyOf, or a property with a different const in each"
    if text.startswith("panic") or "fuel" in text or "too large" in text:
        return "it is too large"
    if text in ("", "NoExtensionBias", "NoExtension"):
        return "no text matches it"
    return text.rsplit("error: ", 1)[-1].split(" 1 | ")[0][:300]
