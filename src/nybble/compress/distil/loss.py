"""What a student is told by a teacher, for each token: pure functions of logits.

    loss = alpha T^2 KL(teacher || student) + (1 - alpha) CE, both averaged over the valid tokens

The KL divergence is that of the distributions softened by the temperature T (Hinton et al. 2015, arXiv 1503.02531). The
factor T^2 keeps the size of its gradient about the same for every T.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

IGNORE = -100  # a label that asks for nothing, as in torch


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 2.0,
    *,
    alpha: float = 1.0,
    labels: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    ignore_index: int = IGNORE,
) -> torch.Tensor:
    """A scalar: alpha T^2 KL(teacher || student) + (1 - alpha) CE, averaged over the valid tokens.

    student_logits, teacher_logits: [..., vocab_size], where both say the same token next. The teacher gets no gradient.
    labels: [...], the token that each position should say; needed where alpha < 1, and those equal to `ignore_index`
    are not valid. mask: [...], true for valid tokens. What is not valid changes neither the loss nor a gradient,
    whatever its logits are. Without a valid token the loss is 0.

    Raises ValueError for shapes that do not go together, a temperature that is not positive or an alpha outside of 0
    to 1.
    """
    _check(student_logits, teacher_logits, temperature, alpha, labels)
    valid = _valid(student_logits, labels, mask, ignore_index)
    student = student_logits[valid]
    loss = student_logits.new_zeros(len(student), dtype=torch.float32)
    if alpha > 0:
        loss = loss + alpha * temperature**2 * divergence(student, teacher_logits[valid], temperature)
    if alpha < 1 and labels is not None:
        loss = loss + (1 - alpha) * F.cross_entropy(student.float(), labels[valid], reduction="none")
    if not len(student):
        return (student_logits[:0] * 0).sum()
    return loss.mean()


def divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(teacher || student) of each token, in nats, without T^2. [tokens, vocab_size] -> [tokens], float32."""
    said = F.log_softmax(_softened(student_logits, temperature), dim=-1)
    wanted = F.log_softmax(_softened(teacher_logits.detach(), temperature), dim=-1)
    return F.kl_div(said, wanted, reduction="none", log_target=True).sum(-1)


def top_k(teacher_logits: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The k likeliest tokens of each position and the logarithms of their probabilities, both [tokens, k].

    What is missing to 1 is the mass of all others.
    """
    wanted = _softened(teacher_logits.detach(), temperature)
    values, ids = wanted.topk(k, dim=-1)
    return ids, values - torch.logsumexp(wanted, dim=-1, keepdim=True)


def top_k_divergence(
    student_logits: torch.Tensor, ids: torch.Tensor, log_probs: torch.Tensor, temperature: float
) -> torch.Tensor:
    """KL of each token between two distributions over k + 1 outcomes: k tokens, and "any other". [tokens], float32.

    ids, log_probs: what `top_k` gave. To leave "any other" out would need the k scaled up to 1, and would teach the
    student to say nothing else. Never more than the divergence over the whole vocabulary.
    """
    said = log_probs_of(student_logits, ids, temperature)
    total = (said - log_probs) * log_probs.exp()
    rest = _log_of_rest(log_probs)
    said_rest = _log_of_rest(said)
    tail = torch.where(rest > _LEAST, rest.exp() * (said_rest - rest), torch.zeros_like(rest))
    return -(total.sum(-1) + tail)


def log_probs_of(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logarithms of the probabilities of some tokens. [tokens, vocab_size], [tokens, k] -> [tokens, k], float32.

    The same as log_softmax and gather, with one tensor of the logits' size for the value and the gradient. The gradient
    can be asked for once.
    """
    # torch gives `apply` no types
    found: torch.Tensor = _LogProbs.apply(logits, ids, temperature)  # type: ignore[no-untyped-call]
    return found


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
        wide = _softened(logits, temperature)
        most = wide.amax(-1, keepdim=True)
        said = wide.gather(-1, ids) - most
        weights = (wide - most).exp_()
        total = weights.sum(-1, keepdim=True)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(weights, total, ids)
            ctx.temperature, ctx.dtype = temperature, logits.dtype
        return said - total.log()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weights, total, ids = ctx.saved_tensors
        grad = grad / ctx.temperature
        # In place: these are the largest tensors of a step. Torch refuses a second backward, which would find them so.
        found = weights.mul_(-grad.sum(-1, keepdim=True) / total).scatter_add_(-1, ids, grad)
        return found.to(ctx.dtype), None, None


def _softened(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    wide = logits.float()
    return wide if temperature == 1 else wide / temperature


_LEAST = math.log(1e-7)  # float32 cannot tell less from a rounding error of the sum


def _log_of_rest(log_probs: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of the probabilities), not below what float32 resolves."""
    return torch.log((1.0 - log_probs.exp().sum(-1)).clamp(min=math.exp(_LEAST)))


def _check(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, alpha: float, labels: torch.Tensor | None
) -> None:
    if student.shape != teacher.shape or student.dim() < 1:
        raise ValueError(
            f"student_logits {list(student.shape)} and teacher_logits {list(teacher.shape)} must have one shape "
            "[..., vocab_size]: both models need the same tokenizer"
        )
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive, not {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 (only labels) to 1 (only the teacher), not {alpha}")
    if alpha < 1 and labels is None:
        raise ValueError(f"alpha is {alpha}, so {1 - alpha:g} of the loss needs labels: give them, or alpha=1")


def _valid(
    logits: torch.Tensor, labels: torch.Tensor | None, mask: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    shape = logits.shape[:-1]
    valid = torch.ones(shape, dtype=torch.bool, device=logits.device)
    for name, given in (("labels", labels), ("mask", mask)):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} {list(given.shape)} must have the shape {list(shape)} of the tokens")
    if labels is not None:
        valid = valid & (labels != ignore_index)
    if mask is not None:
        valid = valid & mask.bool()
    return valid
