"""Masks, bias and penalties: against their definitions in numpy, to the last bit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pytest

from native.sampling_reference import ISAS, allowed, draw, log_softmax, model, random_logits
from nybble import _native

pytestmark = pytest.mark.kernels
Floats = npt.NDArray[np.float32]
VOCAB = 301


@dataclass(frozen=True)
class Edits:
    allowed: frozenset[int] | None = None
    banned: tuple[int, ...] = ()
    bias: dict[int, float] = field(default_factory=dict)
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()

    def native(self, vocab: int = VOCAB) -> _native.LogitEdits:
        return _native.LogitEdits(
            allowed=None if self.allowed is None else bitmask(self.allowed, vocab),
            banned_ids=np.array(self.banned, np.int32),
            bias_ids=np.array(list(self.bias), np.int32),
            bias=np.array(list(self.bias.values()), np.float32),
            repetition_penalty=self.repetition,
            presence_penalty=self.presence,
            frequency_penalty=self.frequency,
            prompt_ids=np.array(self.prompt, np.int32),
            output_ids=np.array(self.output, np.int32),
        )

    def of(self, logits: Floats) -> Floats:
        """The definition, in vLLM's order and in float32."""
        out = logits.copy()
        if self.allowed is not None:
            out[[i for i in range(len(out)) if i not in self.allowed]] = -np.inf
        out[list(self.banned)] = -np.inf
        for token_id, bias in self.bias.items():
            out[token_id] += np.float32(bias)
        for token_id in {*self.prompt, *self.output}:
            penalty = np.float32(self.repetition)
            out[token_id] = out[token_id] / penalty if out[token_id] > 0 else out[token_id] * penalty
        for token_id, count in Counter(self.output).items():
            out[token_id] -= np.float32(self.frequency) * np.float32(count)
            out[token_id] -= np.float32(self.presence)
        return out


def bitmask(ids: frozenset[int], vocab: int) -> npt.NDArray[np.uint32]:
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


PROMPT = tuple(np.random.default_rng(3).integers(0, VOCAB, 60).tolist())
OUTPUT = tuple(np.random.default_rng(4).integers(0, VOCAB, 90).tolist())
SOME = frozenset(np.random.default_rng(5).integers(0, VOCAB, 80).tolist()) | {0, 31, 32, 299, 300}
CASES = {
    "mask": Edits(allowed=SOME),
    "everything": Edits(allowed=frozenset(range(VOCAB))),
    "banned": Edits(banned=(0, 300, 17, 17)),
    "bias": Edits(bias={0: 5.0, 300: -5.0, 44: 0.125, 45: -100.0}),
    "repetition": Edits(repetition=1.3, prompt=PROMPT, output=OUTPUT),
    "repetition-below-1": Edits(repetition=0.7, prompt=PROMPT),
    "presence": Edits(presence=0.6, prompt=PROMPT, output=OUTPUT),
    "frequency": Edits(frequency=0.37, prompt=PROMPT, output=OUTPUT),
    "negative": Edits(presence=-1.1, frequency=-0.3, output=OUTPUT),
    "all": Edits(SOME, (299,), {31: 3.0, 7: 2.0}, 1.1, 0.3, 0.2, PROMPT, OUTPUT),
    "no-history": Edits(repetition=1.3, presence=1.0, frequency=1.0),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_the_whole_order_of_tokens_is_the_definition_s(name, isa):
    """Greedy gives the likeliest; banning what came before gives the next, down to the last."""
    edits = CASES[name]
    row = random_logits(1, VOCAB, seed=9)[0]
    row[:40] = np.round(row[:40] * 2) / 2  # equals, and sums that are exact
    want = edits.of(row)
    order = np.argsort(-want, kind="stable")[: int((want > -np.inf).sum())].tolist()
    rows = [replace(edits, banned=edits.banned + tuple(order[:i])) for i in range(len(order) + 1)]
    logits = np.repeat(row[None], len(rows), axis=0)
    native = [one.native() for one in rows]
    drawn = draw(model(VOCAB, isa=isa), logits, edits=native, temperature=0.0, top_logprobs=-1)
    assert [one[0] for one in drawn[:-1]] == order
    assert drawn[-1] is None  # nothing was left


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6, "top_k": 9}, {"top_p": 0.7, "min_p": 0.01}], ids=str)
def test_draws_follow_the_edited_distribution(params):
    count = 20_000
    edits = CASES["all"]
    row = random_logits(1, VOCAB, seed=6)[0] / 2
    logits = np.repeat(row[None], count, axis=0)
    drawn = draw(model(VOCAB), logits, edits=[edits.native()] * count, position=np.arange(count), **params)
    want = allowed(edits.of(row), **params)
    found = Counter(one[0] for one in drawn)
    assert set(found) <= {token for token, probability in want.items() if probability > 0}
    for token, probability in want.items():
        sigma = (count * probability * (1 - probability)) ** 0.5 + 1
        assert abs(found[token] - count * probability) < 5 * sigma


def test_logprobs_and_rank_are_those_of_the_raw_logits():
    logits = random_logits(1, VOCAB)
    token, logprob, rank, top = draw(model(VOCAB), logits, edits=[Edits(bias={250: 80.0}).native()], top_logprobs=2)[0]
    want = log_softmax(logits[0])
    assert token == 250
    assert logprob == pytest.approx(want[250], abs=1e-5)
    assert rank == 1 + int((logits[0] > logits[0, 250]).sum())
    assert [t for t, _ in top] == np.argsort(-want)[:2].tolist()


def test_rows_without_edits_are_untouched_by_their_neighbours():
    logits = random_logits(40, VOCAB)
    native = model(VOCAB, threads=3)
    plain = draw(native, logits, temperature=0.9, position=np.arange(40), top_logprobs=3)
    for _ in range(3):  # what a worker keeps between rows must not leak
        mixed = [CASES["all"].native() if i % 3 == 1 else None for i in range(40)]
        drawn = draw(native, logits, edits=mixed, temperature=0.9, position=np.arange(40), top_logprobs=3)
        assert [one for i, one in enumerate(drawn) if i % 3 != 1] == [one for i, one in enumerate(plain) if i % 3 != 1]
        alone = draw(native, logits[4:5], edits=[CASES["all"].native()], temperature=0.9, position=4, top_logprobs=3)
        assert alone[0] == drawn[4]
    assert logits.tobytes() == random_logits(40, VOCAB).tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 97, 4999])
def test_masks_of_any_width(vocab, isa):
    logits = random_logits(20, vocab)
    rng = np.random.default_rng(vocab)
    sets = [frozenset(rng.integers(0, vocab, 1 + i * 3).tolist()) for i in range(20)]
    drawn = draw(
        model(vocab, isa=isa), logits, edits=[Edits(allowed=ids).native(vocab) for ids in sets], temperature=0.0
    )
    assert [one[0] for one in drawn] == [max(sorted(ids), key=logits[row].item) for row, ids in enumerate(sets)]


def test_not_a_number_is_not_hidden_by_a_mask():
    logits = random_logits(2, VOCAB)
    logits[1, 200] = np.nan
    edits = Edits(allowed=frozenset({3})).native()
    assert [one is None for one in draw(model(VOCAB), logits, edits=[edits, edits])] == [False, True]


def test_values_that_leave_the_range_of_float_spoil_only_their_row():
    logits = random_logits(3, VOCAB)
    edits = [
        Edits(repetition=1e-38, prompt=(int(logits[0].argmax()),)).native(),
        Edits(frequency=-3e38, output=(1,) * 50).native(),
        None,
    ]
    drawn = draw(model(VOCAB), logits, edits=edits)
    assert drawn[1] is None
    assert drawn[2] is not None


def i32(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"allowed": np.zeros(9, np.uint32)}, "allowed must have 10 words, not 9"),
        ({"allowed": np.zeros(11, np.uint32)}, "allowed must have 10 words, not 11"),
        ({"allowed": np.zeros(0, np.uint32)}, "allowed must not be empty"),
        ({"allowed": np.zeros(10, np.int32)}, "allowed must be an array of uint32"),
        ({"allowed": np.zeros((2, 5), np.uint32)}, "allowed must have 1 dimensions"),
        ({"allowed": np.zeros(20, np.uint32)[::2]}, "allowed must be contiguous"),
        ({"banned_ids": i32(3, VOCAB)}, r"banned_ids\[1\] is 301"),
        ({"banned_ids": i32(-1)}, r"banned_ids\[0\] is -1"),
        ({"banned_ids": np.array([1], np.int64)}, "banned_ids must be an array of int32"),
        ({"bias_ids": i32(VOCAB), "bias": np.ones(1, np.float32)}, r"bias_ids\[0\] is 301"),
        ({"bias_ids": i32(1, 2), "bias": np.ones(1, np.float32)}, "one value for each of bias_ids"),
        ({"bias_ids": i32(1)}, "one value for each of bias_ids"),
        ({"bias_ids": i32(1), "bias": np.array([np.nan], np.float32)}, "bias must be finite"),
        ({"bias_ids": i32(1), "bias": np.ones(1, np.float64)}, "bias must be an array of float32"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be finite and above 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be finite and above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be finite and above 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be finite"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty must be finite"),
        ({"prompt_ids": i32(1, -5)}, r"prompt_ids\[1\] is -5"),
        ({"output_ids": i32(2**31 - 1)}, r"output_ids\[0\] is 2147483647"),
        ({"output_ids": np.array([0.5], np.float32)}, "output_ids must be an array of int32"),
    ],
    ids=str,
)
def test_refuses_edits_that_do_not_fit(edits, message):
    with pytest.raises(ValueError, match=message):
        draw(model(VOCAB), random_logits(1, VOCAB), edits=[_native.LogitEdits(**edits)])


def test_refuses_lists_of_something_else():
    logits = random_logits(2, VOCAB)
    with pytest.raises(ValueError, match="edits must hold LogitEdits or None"):
        draw(model(VOCAB), logits, edits=[None, "ban"])
    with pytest.raises(ValueError, match="one value for each row"):
        draw(model(VOCAB), logits, edits=[None])
