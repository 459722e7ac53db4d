"""Distillation as a task of the training loop: also that of training with quantisation in the loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from nybble.backends.torch.trainable import TrainableDecoder, head_logits
from nybble.compress.distil.teacher import Teacher
from nybble.compress.train.head import chunked_sum


class DistilTask:
    """alpha, temperature: as in `distillation_loss`. hidden: weight of the hidden-state terms: the mean square of the
    difference over that of the teacher's, averaged over the pairs of layers. keep: the student's layers of the pairs.

    teacher: None with alpha 0, where only labels teach.
    """

    def __init__(
        self,
        model: TrainableDecoder,
        teacher: Teacher | None,
        *,
        alpha: float,
        temperature: float,
        hidden: float = 0.0,
        keep: tuple[int, ...] = (),
        rate: Callable[[str], float] = lambda name: 1.0,
    ) -> None:
        self.model = model
        self._teacher = teacher
        self._alpha = alpha
        self._temperature = temperature
        self._hidden = hidden
        self._keep = keep
        self._rate = rate

    @property
    def terms(self) -> tuple[str, ...]:
        """The whole, then its parts as they are before they are weighted."""
        return ("loss", "kl", "cross_entropy", "hidden") if self._hidden else ("loss", "kl", "cross_entropy")

    def rate(self, name: str) -> float:
        """As Task.rate."""
        return self._rate(name)

    def losses(self, token_ids: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """As Task.losses."""
        inputs, labels = token_ids[:, :-1], token_ids[:, 1:].flatten()
        answer = None if self._teacher is None else self._teacher.answer(inputs, rows)
        alpha, heat = self._alpha, self._temperature
        spec = self.model.spec

        def chunk(x: torch.Tensor, weight: torch.Tensor, part: slice) -> torch.Tensor:
            logits = head_logits(spec, x, weight)
            kl = logits.new_zeros(()) if answer is None else answer.divergence(logits, part).sum()
            with torch.set_grad_enabled(alpha < 1):
                cross = F.cross_entropy(logits, labels[part], reduction="sum")
            return torch.stack((alpha * heat**2 * kl + (1 - alpha) * cross, kl, cross))

        def head(x: torch.Tensor, weight: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
            terms = chunked_sum(x.flatten(0, 1), weight, chunk, num_terms=3) / labels.numel()
            if not self._hidden or answer is None:
                return terms
            far = torch.stack([_distance(ours, theirs) for ours, theirs in zip(kept, answer.hidden, strict=True)])
            term = far.mean()
            return torch.cat(((terms[0] + self._hidden * term)[None], terms[1:].detach(), term.detach()[None]))

        found: torch.Tensor = self.model(inputs, head, self._keep)
        return found


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    theirs = theirs.float()
    return (ours.float() - theirs).square().mean() / theirs.square().mean().clamp(min=1e-12)


def pairs(student_layers: int, teacher_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Layers whose outputs should agree: each of the student's, and the teacher's at the same share of the way."""
    ours = tuple(range(student_layers))
    theirs = tuple(max(0, round((i + 1) * teacher_layers / student_layers) - 1) for i in ours)
    return ours, theirs
