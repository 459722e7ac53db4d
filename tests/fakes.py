"""A model and a tokenizer that are small enough to predict, for tests of everything around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from nybble.backends.cpu import Sampled, SampleRow, Scored, Step

VOCAB = 97
Following = Callable[[list[int], int], int]


def expected_next(history: list[int], seed: int = 0) -> int:
    """Depends on every token, on its position, and on the seed."""
    value = 7 + seed % 10_007
    for position, token_id in enumerate(history):
        value = (value * 31 + token_id * (position + 1) + 3) % 10_007
    return value % VOCAB


def repeating_next(history: list[int], seed: int = 0) -> int:
    """Goes round in circles, and leaves them now and then."""
    if len(history) % 13 == seed % 13:
        return expected_next(history, seed)
    return sum(history[-2:]) % 5


def continuation(prompt: list[int], count: int, seed: int = 0, following: Following = expected_next) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens, seed))
    return tokens[len(prompt) :]


class FakeModel:
    """Keeps token ids in the blocks where a real model keeps keys and values.

    What it "computes" for a token is read back through the block table, so that a wrong block, a missing copy or a
    block that was given away too early changes the tokens. With `seeded`, the draw depends on the sequence's seed too.
    """

    def __init__(self, *, seeded: bool = False, following: Following = expected_next) -> None:
        self.cache: npt.NDArray[np.int64] = np.zeros((0, 16), np.int64)
        self.steps: list[Step] = []
        self.rows: list[SampleRow] = []
        self.seeded = seeded
        self.following = following
        self._histories: list[list[int]] = []
        self._hidden: npt.NDArray[np.float32] | None = None

    def new_cache(self, num_blocks: int) -> None:
        self.cache = np.full((num_blocks, 16), -1, np.int64)

    def execute(self, step: Step) -> npt.NDArray[np.float32]:
        self.steps.append(step)
        histories: dict[int, list[int]] = {}
        for row in range(len(step.context_lens)):
            begin, end = int(step.cu_seqlens_q[row]), int(step.cu_seqlens_q[row + 1])
            table = step.block_tables[row]
            for query in range(begin, end):
                position = int(step.context_lens[row]) + query - begin
                self.cache[table[position // 16], position % 16] = step.token_ids[query]
                histories[query] = [int(self.cache[table[p // 16], p % 16]) for p in range(position + 1)]
        self._histories = [histories[int(row)] for row in step.logit_rows]
        if step.hidden_rows is not None:
            self._hidden = np.array([[sum(histories[int(row)]), 1.0] for row in step.hidden_rows], np.float32)
        one_hot = [np.eye(VOCAB, dtype=np.float32)[self.following(h, 0)] for h in self._histories]
        logits = np.array(one_hot, np.float32).reshape(-1, VOCAB)
        if self.seeded:
            # The row number rides along, so that a seeded draw finds the history again after rows were dropped.
            logits *= 1 + np.arange(len(logits), dtype=np.float32)[:, None] / 1024
        return logits

    def hidden(self) -> npt.NDArray[np.float32]:
        assert self._hidden is not None
        return self._hidden

    def sample(self, logits: npt.NDArray[np.float32], params: Sequence[SampleRow]) -> list[Sampled]:
        self.rows += params
        assert len(logits) == len(params)
        if self.seeded:
            histories = [self._histories[round((float(row.max()) - 1) * 1024)] for row in logits]
            drawn = [self.following(h, row.seed) for h, row in zip(histories, params, strict=True)]
        else:
            drawn = [int(row.argmax()) for row in logits]
        return [Sampled(token_id, -0.5, ((1, -0.25),), 2) for token_id in drawn]

    def score_hidden(self, hidden: npt.NDArray[np.float32], target_ids: Sequence[int], top: int = 0) -> list[Scored]:
        return [Scored(-float(h[0]), 1, ((5, -0.125),) * min(top, 1)) for h, _ in zip(hidden, target_ids, strict=True)]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            self.cache[target] = self.cache[source]

    def cache_blocks(self) -> FakeBlocks:
        return FakeBlocks(self.cache)


class FakeBlocks:
    """The token ids of a FakeModel's blocks as bytes."""

    def __init__(self, cache: npt.NDArray[np.int64]) -> None:
        self.cache = cache

    @property
    def block_bytes(self) -> int:
        return 16 * 8

    def read(self, ids: Sequence[int]) -> npt.NDArray[np.uint8]:
        return self.cache[list(ids)].view(np.uint8)

    def write(self, ids: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        self.cache[list(ids)] = data.view(np.int64)


class FakeTokenizer:
    """Token n is the letter at n."""

    def stream(self, *, skip_special: bool = True) -> FakeTokenizer:
        return self

    def push(self, token_id: int) -> str:
        return chr(0x100 + token_id)

    def flush(self) -> str:
        return "."

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        return [ord(letter) % VOCAB for letter in text]

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str:
        return "".join(map(self.push, token_ids))
