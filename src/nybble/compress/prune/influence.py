"""How much a layer matters: how far it turns the residual stream, and what the text costs without it.

Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(slots=True)
class BlockInfluence:
    """1 - the mean cosine between a layer's input and its output, over tokens. Men et al. 2024, arXiv 2403.03853."""

    total: float = 0.0
    count: int = 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Both [..., hidden_size]."""
        cosine = F.cosine_similarity(before.double(), after.double(), dim=-1)
        self.total += float((1 - cosine).sum())
        self.count += cosine.numel()

    @property
    def value(self) -> float:
        return self.total / max(1, self.count)


def least_influential(values: Sequence[float], count: int) -> list[int]:
    """The `count` layers with the least influence, ascending."""
    return sorted(sorted(range(len(values)), key=lambda i: values[i])[:count])


def mean_loss(logits: torch.Tensor, token_ids: torch.Tensor) -> float:
    """Of every token given those before it, in nats. logits: [batch, tokens, vocab]; token_ids: [batch, tokens]."""
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), token_ids[:, 1:].flatten()))
