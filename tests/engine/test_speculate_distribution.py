"""With temperature, guesses leave the distribution as it is: 100,000 draws against what was asked for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from nybble.backends.cpu import CpuModel, Sampled, SampleRow, Step
from nybble.core.sampling import SamplingParams
from nybble.engine.core import EngineCore
from nybble.engine.speculation.draft_model import DraftWeights

from native.sampling_reference import model as native_sampler  # isort: skip

pytestmark = pytest.mark.unit

VOCAB = 8
TEMPERATURE = 0.8
LENGTH, ROUNDS, BATCH = 250, 4, 100  # 100,000 tokens
# The 99.99 % quantile of chi-square with 8 x 7 degrees of freedom.
LIMIT = 106.1


class Chain:
    """The next token depends on the last one alone; drawn by the real sampler."""

    def __init__(self, sampler: CpuModel, table: npt.NDArray[np.float32]) -> None:
        self._sampler = sampler
        self._table = table
        self.num_steps = 0

    def new_cache(self, num_blocks: int) -> None:
        pass

    def execute(self, step: Step) -> npt.NDArray[np.float32]:
        self.num_steps += 1
        return self._table[step.token_ids[step.logit_rows]]

    def sample(self, logits: npt.NDArray[np.float32], params: list[SampleRow]) -> list[Sampled]:
        return self._sampler.sample(logits, params)


def texts(core: EngineCore, rounds: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number in range(rounds):
        for place in range(BATCH):
            params = SamplingParams(
                temperature=TEMPERATURE, seed=number * BATCH + place, max_tokens=LENGTH, detokenize=False, logprobs=None
            )
            core.add_request(core.make_request(f"{number} {place}", [place % VOCAB], params))
        while core.has_unfinished_requests:
            for output in core.step():
                if output.finished:
                    found[output.request_id] = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    return found


def engine(target: Chain, draft: Chain, speculate: str) -> EngineCore:
    return EngineCore(
        target, None, context=256, vocab_size=VOCAB, num_blocks=BATCH * 17, max_num_seqs=BATCH, speculate=speculate,
        draft=DraftWeights(draft, 256, VOCAB),  # type: ignore[arg-type]
    )  # type: ignore[arg-type]  # fmt: skip


def test_the_distribution_is_that_of_the_target() -> None:
    random = np.random.default_rng(7)
    table = random.normal(0, 1.5, (VOCAB, VOCAB)).astype(np.float32)
    other = (table + random.normal(0, 1.0, table.shape)).astype(np.float32)  # a draft that is often wrong
    sampler = CpuModel(native_sampler(VOCAB, threads=1))
    target = Chain(sampler, table)
    core = engine(target, Chain(sampler, other), "draft=small,k=3,always")
    found = texts(core, ROUNDS)
    stats = core.stats().speculation
    assert 0.3 < stats.accepted / stats.drafted < 0.95

    pairs = np.zeros((VOCAB, VOCAB))
    for text in found.values():
        np.add.at(pairs, (text[:-1], text[1:]), 1)
    assert pairs.sum() == ROUNDS * BATCH * LENGTH == 100_000
    weights = np.exp(table.astype(np.float64) / TEMPERATURE)
    expected = weights / weights.sum(1, keepdims=True) * pairs.sum(1, keepdims=True)
    assert float(((pairs - expected) ** 2 / expected).sum()) < LIMIT

    plain = Chain(sampler, table)
    alone = texts(engine(plain, plain, "off"), 1)
    assert alone == {name: found[name] for name in alone}  # and token for token what is drawn without guesses
    assert target.num_steps / ROUNDS < plain.num_steps * 0.8
