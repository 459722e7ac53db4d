"""From what a caller asks to a request that the engine can run: checked, and with everything ready that takes time."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nybble.core.errors import ConfigError, PromptError
from nybble.core.sampling import MAX_SEED, SamplingParams, StructuredOutputsParams
from nybble.engine.adapters import LoadedAdapter
from nybble.engine.model import EngineTokenizer
from nybble.engine.request import Matcher, Pooling, Request, Sequence
from nybble.engine.rows import DrawRules
from nybble.engine.scheduler import blocks_for
from nybble.engine.text import TextStream

Compiler = Callable[[StructuredOutputsParams], Matcher]


@dataclass(frozen=True, slots=True)
class Limits:
    """What fits an engine."""

    context: int  # tokens of a sequence
    vocab_size: int
    num_blocks: int
    max_num_seqs: int


class RequestMaker:
    """Makes requests for one engine. Safe on any thread."""

    def __init__(
        self,
        limits: Limits,
        *,
        tokenizer: EngineTokenizer | None,
        eos_token_ids: frozenset[int],
        compile_grammar: Compiler | None,
        seed: int | None,
    ) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._compile = compile_grammar
        self._seeds = None if seed is None else np.random.default_rng(seed)

    def make(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None,
        priority: int,
        cache_salt: str | None,
        adapter: LoadedAdapter | None,
        pooling: Pooling | None,
    ) -> Request:
        """See EngineCore.make_request."""
        limits = self._limits
        longest = self._check_prompt(prompt_token_ids, params, pooling)
        if params.n > limits.max_num_seqs:
            raise ConfigError(f"n is {params.n}, but at most {limits.max_num_seqs} sequences run at once")
        rules = DrawRules(
            params, vocab_size=limits.vocab_size, eos_token_ids=self._eos_token_ids, encode=self._encoder()
        )
        matcher = self._matcher(params)
        request = Request(
            request_id,
            prompt_token_ids,
            params,
            rules,
            prompt=prompt,
            priority=priority,
            cache_salt=cache_salt,
            adapter=adapter,
            pooling=pooling,
        )
        seed = self._fresh_seed() if params.seed is None else params.seed
        for index in range(1 if pooling else params.n):
            request.sequences.append(
                Sequence(
                    request,
                    index,
                    (seed + index) & MAX_SEED,
                    list(prompt_token_ids),
                    self._text_stream(params),
                    longest,
                    matcher if index == 0 or matcher is None else matcher.fork(),
                )
            )
        return request

    def _check_prompt(self, prompt: list[int], params: SamplingParams, pooling: Pooling | None) -> int:
        """The length that a sequence may reach."""
        limits = self._limits
        if not prompt:
            raise PromptError("the prompt is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
            unknown = next(i for i in prompt if not 0 <= i < limits.vocab_size)
            raise PromptError(f"the prompt holds {unknown}, which is not a token id (0 to {limits.vocab_size - 1})")
        longest = len(prompt) if pooling else limits.context
        if not pooling and params.max_tokens is not None:
            longest = min(len(prompt) + params.max_tokens, limits.context)
        if len(prompt) + (not pooling) > limits.context:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens and the context holds {limits.context}, which leaves no room "
                "for an answer: shorten the prompt or ask for a larger context"
            )
        if blocks_for(longest) > limits.num_blocks:
            raise PromptError(
                f"{len(prompt)} prompt tokens and up to {longest - len(prompt)} new ones need {blocks_for(longest)} "
                f"cache blocks, there are {limits.num_blocks}: shorten the prompt or lower max_tokens"
            )
        return longest

    def _encoder(self) -> Callable[[str], list[int]] | None:
        tokenizer = self._tokenizer
        return None if tokenizer is None else lambda text: tokenizer.encode(text, add_special=False)

    def _matcher(self, params: SamplingParams) -> Matcher | None:
        if params.structured_outputs is None:
            return None
        if self._compile is None:
            raise ConfigError("this engine was started without structured outputs")
        return self._compile(params.structured_outputs)

    def _text_stream(self, params: SamplingParams) -> TextStream:
        detokenizer = None
        if self._tokenizer is not None and params.detokenize:
            detokenizer = self._tokenizer.stream(skip_special=params.skip_special_tokens)
        return TextStream(detokenizer, params.stop_strings, include_stop=params.include_stop_str_in_output)

    def _fresh_seed(self) -> int:
        return secrets.randbits(64) if self._seeds is None else int(self._seeds.integers(0, MAX_SEED, dtype=np.uint64))
