"""The sampler of the torch backend gives the tokens of the native one: same semantics, same seed, same token."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from backends.torch.op_cases import DEVICE
from native.sampling_reference import model, random_logits
from nybble.backends.cpu import sampling as native
from nybble.backends.cpu.step import BadLogitsError, SampleRow
from nybble.backends.torch import ops

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels
VOCAB = 2500  # more than the most that are walked by logit
CUTS = list(itertools.product((0, 1, 40, 2200), (0.0, 0.01), (1.0, 0.9, 0.9999)))  # top_k, min_p, top_p


@pytest.fixture(scope="module")
def cpu():
    return model(VOCAB)


def cut_rows(seed: int) -> list[SampleRow]:
    return [
        SampleRow(temperature=0.7 + 0.1 * i, top_k=k, top_p=p, min_p=m, seed=seed * 7919, position=i, logprobs=None)
        for i, (k, m, p) in enumerate(CUTS)
    ]


def edited_rows(seed: int) -> list[SampleRow]:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 1 << 32, (VOCAB + 31) // 32, dtype=np.uint32)
    prompt, output = (rng.integers(0, VOCAB, n).astype(np.int32) for n in (900, 400))
    seen = {"prompt_ids": prompt, "output_ids": output}
    edits = [
        {"allowed_mask": mask},
        {"banned_ids": (1, 2, 3), "logit_bias": ((7, 4.0), (9, -100.0))},
        {"repetition_penalty": 1.7, **seen},
        {"frequency_penalty": 0.7, "presence_penalty": -0.4, **seen},
        {"allowed_mask": mask, "banned_ids": (5,), "logit_bias": ((8, 9.0),), "repetition_penalty": 0.8, **seen},
        {},
    ]
    pairs = [(edit, temperature) for edit in edits for temperature in (0, 1)]
    return [SampleRow(t, seed=seed, position=i, logprobs=3, **edit) for i, (edit, t) in enumerate(pairs)]


def same(cpu, logits: np.ndarray, rows: list[SampleRow]) -> None:
    wanted = native.sample(cpu, logits, rows)
    found = ops.sample(torch.from_numpy(logits).to(DEVICE), rows)
    for ours, theirs, row in zip(found, wanted, rows, strict=True):
        assert ours.token_id == theirs.token_id, row
        assert ours.rank == theirs.rank, row
        assert [i for i, _ in ours.top_logprobs] == [i for i, _ in theirs.top_logprobs], row
        if row.logprobs is not None:
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_cuts_without_kernels(cpu, seed: int, monkeypatch) -> None:
    monkeypatch.setenv("NYBBLE_TORCH_OPS", "torch")
    same(cpu, random_logits(len(CUTS), VOCAB, seed), cut_rows(seed))


def test_cuts_with_kernels(cpu, monkeypatch) -> None:
    monkeypatch.setenv("NYBBLE_TORCH_OPS", "triton")
    rows = cut_rows(int(np.random.default_rng().integers(1 << 20)))[::2]
    same(cpu, random_logits(len(rows), VOCAB, 5), rows)


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_edits(cpu, kind: str, monkeypatch) -> None:
    monkeypatch.setenv("NYBBLE_TORCH_OPS", kind)
    same(cpu, random_logits(12, VOCAB, 6), edited_rows(6))


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_equal_and_forbidden_logits(cpu, kind: str, monkeypatch) -> None:
    """Of equals the lower ids come first, in cuts and in draws; minus infinity is never drawn."""
    monkeypatch.setenv("NYBBLE_TORCH_OPS", kind)
    logits = np.full((6, VOCAB), -np.inf, np.float32)
    logits[:, 100:110] = 1.0
    logits[:, 300:304] = [2.0, 0.0, -0.0, 2.0]
    rows = [SampleRow(0, logprobs=5), SampleRow(top_k=5, seed=3), SampleRow(top_p=0.5, seed=4), SampleRow(seed=5)]
    rows += [SampleRow(min_p=0.5, seed=6), SampleRow(top_k=8, top_p=0.95, seed=8)]
    same(cpu, logits, rows)


@pytest.mark.parametrize("kind", ["torch", "triton"])
def test_rows_that_are_no_distribution_are_named(kind: str, monkeypatch) -> None:
    monkeypatch.setenv("NYBBLE_TORCH_OPS", kind)
    logits = torch.zeros(5, 40, device=DEVICE)
    logits[1, 7], logits[2, 0], logits[3] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(BadLogitsError) as raised:
        ops.sample(logits, [SampleRow()] * 5)
    assert raised.value.rows == (1, 2, 3)
    with pytest.raises(BadLogitsError, match="logit row 1, 2, 3"):
        ops.score(logits, [0] * 5)
    nothing = np.zeros(2, np.uint32)
    with pytest.raises(BadLogitsError, match="row 1:"):
        ops.sample(logits[[0, 4]], [SampleRow(0), SampleRow(allowed_mask=nothing)])


def test_scores_of_given_tokens() -> None:
    logits = random_logits(3, VOCAB, 9)
    cpu = model(VOCAB)
    wanted = native.score(cpu.score, logits, [5, 17, 2499], 4)
    found = ops.score(torch.from_numpy(logits).to(DEVICE), [5, 17, 2499], 4)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.rank, [i for i, _ in ours.top_logprobs]) == (theirs.rank, [i for i, _ in theirs.top_logprobs])
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (SampleRow(temperature=-1), "temperature must be finite and not negative"),
        (SampleRow(top_p=0), "top_p must be above 0"),
        (SampleRow(min_p=2), "min_p must be between 0 and 1"),
        (SampleRow(seed=-1), "seed must fit uint64"),
        (SampleRow(banned_ids=(40,)), "banned_ids must lie between 0 and 39"),
        (SampleRow(logit_bias=((1, float("inf")),)), "bias must be finite"),
        (SampleRow(repetition_penalty=0), "repetition_penalty must be finite and above 0"),
        (SampleRow(presence_penalty=float("nan")), "presence_penalty must be finite"),
        (SampleRow(allowed_mask=np.zeros(3, np.uint32)), "allowed must have 2 words"),
    ],
)
def test_refused(row: SampleRow, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.sample(torch.zeros(1, 40), [row])


def test_no_rows_and_wrong_counts() -> None:
    assert ops.sample(torch.zeros(0, 40), []) == []
    with pytest.raises(ValueError, match="one value for each row"):
        ops.sample(torch.zeros(2, 40), [SampleRow()])
    with pytest.raises(ValueError, match="target_ids must lie between 0 and 39"):
        ops.score(torch.zeros(1, 40), [40])
