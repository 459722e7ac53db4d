"""A small byte-level tokenizer, and random walks through what a grammar allows."""

from __future__ import annotations

import json
import random

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from nybble.core.tokenizer_source import GgufTokenizer
from nybble.engine.grammar import GrammarMatcher
from nybble.tokenizer import Tokenizer, load_tokenizer

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
BOS, EOS, TURN = 0, 1, 2
CORPUS = [
    '{"name": "Ada", "age": 36, "tags": ["a", "b"], "nested": {"value": null, "ok": true}}',
    '[\n    {"größe": -1.5e3, "日本": "語"},\n    {"id": 12, "x": false}\n]',
    'She said "hello" and\nleft: naïve café, привет мир! 2024-02-29T12:30:00Z a@b.example http://x.y/z?q=1',
]


def byte_level_tokenizer(size: int = 500) -> Tokenizer:
    """A trained GPT-2-like tokenizer, rebuilt from its description in GGUF's keys."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "<|end|>", "<tool_call>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 8, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return load_tokenizer(
        GgufTokenizer(
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": "gpt-2",
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": [CONTROL, CONTROL, USER_DEFINED, *[NORMAL] * (len(tokens) - 3)],
                "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
                "tokenizer.ggml.bos_token_id": BOS,
                "tokenizer.ggml.eos_token_id": EOS,
            }
        )
    )


def allowed(matcher: GrammarMatcher, vocab_size: int) -> list[int]:
    """The ids that the mask allows."""
    mask = np.empty((vocab_size + 31) // 32, np.uint32)
    matcher.fill_mask(mask)
    return [int(i) for i in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))]


class Walker:
    """Draws tokens at random among the allowed ones; after a while rather those that close what is open."""

    def __init__(self, tokenizer: Tokenizer, *, patience: int = 40, limit: int = 4000) -> None:
        self._tokenizer = tokenizer
        self._closing = [tokenizer.token_bytes(i) in (b'"', b"}", b"]") for i in range(tokenizer.vocab_size)]
        self._patience = patience
        self._limit = limit

    def text(self, matcher: GrammarMatcher, pick: random.Random) -> str:
        """One complete text, bytes that are not UTF-8 as U+FFFD."""
        token_ids: list[int] = []
        while not matcher.is_finished():
            choices = allowed(matcher, self._tokenizer.vocab_size)
            late = len(token_ids) > self._patience
            if EOS in choices and (late or pick.random() < 0.3):
                assert matcher.accept(EOS)
                break
            choices = [i for i in choices if i != EOS]
            if late and pick.random() < 0.5:
                choices = [i for i in choices if self._closing[i]] or choices
            token_id = pick.choice(choices)
            assert matcher.accept(token_id)
            token_ids.append(token_id)
            assert len(token_ids) < self._limit, self._tokenizer.decode(token_ids)
        return self._tokenizer.decode(token_ids)
