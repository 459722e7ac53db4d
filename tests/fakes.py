"""A model and a tokenizer that are small enough to predict, for tests of everything around them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nybble.backends.cpu import Sampled, SampleRow, Step

VOCAB = 97


def expected_next(history: list[int]) -> int:
    value = 7
    for position, token_id in enumerate(history):
        value = (value * 31 + token_id * (position + 1) + 3) % 10_007
    return value % VOCAB


def continuation(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(expected_next(tokens))
    return tokens[len(prompt) :]


class FakeModel:
    """Keeps token ids in the blocks where a real model keeps keys and values."""

    def __init__(self) -> None:
        self.cache: npt.NDArray[np.int64] = np.zeros((0, 16), np.int64)
        self.steps: list[Step] = []
        self.rows: list[SampleRow] = []

    def new_cache(self, num_blocks: int) -> None:
        self.cache = np.full((num_blocks, 16), -1, np.int64)

    def execute(self, step: Step) -> npt.NDArray[np.float32]:
        self.steps.append(step)
        logits = []
        for row in range(len(step.context_lens)):
            begin, end = step.cu_seqlens_q[row], step.cu_seqlens_q[row + 1]
            for query in range(begin, end):
                position = int(step.context_lens[row]) + query - begin
                self.cache[step.block_tables[row, position // 16], position % 16] = step.token_ids[query]
                if query in step.logit_rows:
                    history = [self._at(step.block_tables[row], p) for p in range(position + 1)]
                    logits.append(np.eye(VOCAB, dtype=np.float32)[expected_next(history)])
        return np.array(logits, np.float32).reshape(-1, VOCAB)

    def sample(self, logits: npt.NDArray[np.float32], params: list[SampleRow]) -> list[Sampled]:
        self.rows += params
        return [Sampled(int(row.argmax()), -0.5, ((1, -0.25),)) for row in logits]

    def _at(self, table: npt.NDArray[np.int32], position: int) -> int:
        return int(self.cache[table[position // 16], position % 16])


class FakeTokenizer:
    """Token n is the letter at n."""

    def stream(self) -> FakeTokenizer:
        return self

    def push(self, token_id: int) -> str:
        return chr(0x100 + token_id)

    def flush(self) -> str:
        return "."
