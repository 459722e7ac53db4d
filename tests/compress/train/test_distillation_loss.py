"""`nybble.distillation_loss` and what training makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import nybble  # noqa: E402
from nybble.compress.distil.loss import divergence, log_probs_of, top_k, top_k_divergence  # noqa: E402  # needs torch
from nybble.compress.train.head import chunked_sum  # noqa: E402

pytestmark = [pytest.mark.unit]
SHAPE, VOCAB = (2, 5), 11


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((*SHAPE, VOCAB)).astype(np.float32) * scale)


def labels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(9).integers(0, VOCAB, SHAPE))


def by_loop(student: torch.Tensor, teacher: torch.Tensor, heat: float, alpha: float, targets: torch.Tensor) -> float:
    """The formula with Python's numbers."""
    total, count = 0.0, 0
    for s, t, y in zip(student.reshape(-1, VOCAB), teacher.reshape(-1, VOCAB), targets.reshape(-1), strict=True):
        if int(y) == -100:
            continue
        p = [math.exp(float(x) / heat) for x in t]
        q = [math.exp(float(x) / heat) for x in s]
        plain = [math.exp(float(x)) for x in s]
        kl = sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
        total += alpha * heat**2 * kl - (1 - alpha) * math.log(plain[int(y)] / sum(plain))
        count += 1
    return total / count


@pytest.mark.parametrize("alpha", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_it_is_what_a_plain_loop_gives(temperature: float, alpha: float) -> None:
    targets = labels()
    targets[0, 1] = -100
    found = nybble.distillation_loss(logits(0), logits(1), temperature, alpha=alpha, labels=targets)
    assert float(found) == pytest.approx(by_loop(logits(0), logits(1), temperature, alpha, targets), rel=1e-5)


def test_the_temperature_is_2_unless_said() -> None:
    found = nybble.distillation_loss(student_logits=logits(0), teacher_logits=logits(1))
    assert float(found) == pytest.approx(by_loop(logits(0), logits(1), 2.0, 1.0, labels()), rel=1e-5)


def test_gradients_have_one_size_for_all_temperatures() -> None:
    norms = []
    for temperature in (1.0, 2.0, 4.0):
        student = logits(0, 0.5).requires_grad_()
        nybble.distillation_loss(student, logits(1, 0.5), temperature=temperature).backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert max(norms) < 1.25 * min(norms)


def test_what_is_masked_changes_nothing() -> None:
    mask = torch.ones(SHAPE, dtype=torch.bool)
    mask[1, 3:] = False
    results = []
    for junk in (0.0, 1e4, float("nan")):
        student, teacher = logits(0), logits(1)
        student[1, 3:] += junk
        teacher[1, 3:] -= junk
        student.requires_grad_()
        loss = nybble.distillation_loss(student, teacher, alpha=0.5, labels=labels(), mask=mask)
        loss.backward()
        assert student.grad is not None
        results.append((float(loss.detach()), student.grad))
        assert (student.grad[1, 3:] == 0).all()
    assert all(loss == results[0][0] and torch.equal(grad, results[0][1]) for loss, grad in results)


def test_padding_changes_nothing() -> None:
    wide = [torch.cat((logits(seed), torch.randn(SHAPE[0], 4, VOCAB) * 50), dim=1) for seed in (0, 1)]
    targets = torch.cat((labels(), torch.full((SHAPE[0], 4), -100)), dim=1)
    padded = nybble.distillation_loss(*wide, alpha=0.7, labels=targets)
    assert float(padded) == pytest.approx(
        float(nybble.distillation_loss(logits(0), logits(1), alpha=0.7, labels=labels())), rel=1e-6
    )


def test_equal_logits_lose_nothing_and_no_token_is_no_loss() -> None:
    assert float(nybble.distillation_loss(logits(0), logits(0))) == pytest.approx(0, abs=1e-6)
    student = logits(0).requires_grad_()
    loss = nybble.distillation_loss(student, logits(1), mask=torch.zeros(SHAPE, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0 and student.grad is not None and (student.grad == 0).all()


def test_the_teacher_gets_no_gradient() -> None:
    teacher = logits(1).requires_grad_()
    nybble.distillation_loss(logits(0).requires_grad_(), teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"alpha": 1.5}, "alpha must be from 0"),
        ({"alpha": 0.5}, "needs labels"),
        ({"mask": torch.ones(3)}, r"mask \[3\] must have the shape"),
        ({"teacher_logits": torch.zeros(2, 5, 7)}, "same tokenizer"),
    ],
)
def test_what_cannot_be_used_is_said(change: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"student_logits": logits(0), "teacher_logits": logits(1)}
    with pytest.raises(ValueError, match=message):
        nybble.distillation_loss(**{**values, **change})  # type: ignore[arg-type]


def test_all_tokens_kept_are_the_whole_divergence() -> None:
    student, teacher = (logits(seed).reshape(-1, VOCAB) for seed in (0, 1))
    whole = divergence(student, teacher, 2.0)
    assert torch.allclose(top_k_divergence(student, *top_k(teacher, VOCAB, 2.0), 2.0), whole, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_of_some_tokens_are_those_of_all(temperature: float, dtype: torch.dtype) -> None:
    """Values and gradients; a token may be asked for twice."""
    ids = torch.tensor([[0, 3, 3], [VOCAB - 1, 2, 0]])
    start = 30 * torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    ours, plain = (start.to(dtype).requires_grad_() for _ in range(2))
    found = log_probs_of(ours, ids, temperature)
    expected = torch.log_softmax(plain.float() / temperature, -1).gather(-1, ids)
    assert found.dtype == torch.float32 and torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert ours.grad is not None and plain.grad is not None and ours.grad.dtype == dtype
    assert torch.allclose(ours.grad, plain.grad, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_the_gradient_of_log_probs_is_given_once() -> None:
    """It takes the place of what it is made of: wrong numbers would follow."""
    found = log_probs_of(logits(0).reshape(-1, VOCAB).requires_grad_(), torch.zeros(1, 1, dtype=torch.int64), 1.0).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_the_rest_is_one_more_outcome() -> None:
    """As if the tokens that are not kept were merged into one, in both distributions."""
    student, teacher = (logits(seed).reshape(-1, VOCAB) for seed in (0, 1))
    ids, log_probs = top_k(teacher, 4, 1.0)
    found = top_k_divergence(student, ids, log_probs, 1.0)
    for row in range(len(student)):
        p, q = torch.softmax(teacher[row], -1), torch.softmax(student[row], -1)
        kept = ids[row]
        merged = [torch.cat((x[kept], 1 - x[kept].sum()[None])) for x in (p, q)]
        expected = (merged[0] * (merged[0].log() - merged[1].log())).sum()
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-4)
    assert (found <= divergence(student, teacher, 1.0) + 1e-6).all()


def test_the_kept_gradient_pulls_the_rest_to_the_teachers_mass() -> None:
    """Without the last outcome a student would be taught to say nothing but the kept tokens."""
    teacher = logits(1).reshape(-1, VOCAB)[:1]
    ids, log_probs = top_k(teacher, 3, 1.0)
    student = torch.zeros(1, VOCAB, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        top_k_divergence(student, ids, log_probs, 1.0).sum().backward()
        optimizer.step()
    said = torch.softmax(student.detach(), -1).gather(-1, ids)
    assert torch.allclose(said, log_probs.exp(), atol=1e-3)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_of_tokens_give_the_whole(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(20, 8, generator=generator), torch.randn(VOCAB, 8, generator=generator)
    teacher = torch.randn(20, VOCAB, generator=generator)

    def loss(x: torch.Tensor, weight: torch.Tensor, part: slice) -> torch.Tensor:
        kl = divergence(x @ weight.T, teacher[part], 1.0).sum()
        return torch.stack((2 * kl, kl))

    whole = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
    expected = loss(whole[0], whole[1], slice(0, 20))
    (expected[0] / 20).backward()
    cut = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
    found = chunked_sum(cut[0], cut[1], loss, num_terms=2, chunk_tokens=chunk)
    (found[0] / 20).backward()
    assert torch.allclose(found, expected.detach(), rtol=1e-5)
    for a, b in zip(whole, cut, strict=True):
        assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-6)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head = torch.randn(6, 4, requires_grad=True), torch.randn(VOCAB, 4)
    chunked_sum(hidden, head, lambda x, w, part: (x @ w.T).square().sum()[None], num_terms=1).sum().backward()
    assert hidden.grad is not None and head.grad is None
