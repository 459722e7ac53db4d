"""Which weights are set to zero: by magnitude, or by magnitude times what they are multiplied with.

A mask is a bool tensor of a weight's shape, true where the weight stays. Knows nothing about models or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from nybble.core.errors import ConfigError

_HALF_BITS = 16


@dataclass(frozen=True, slots=True)
class NM:
    """Of every `group` inputs that follow each other, `keep` stay."""

    keep: int
    group: int

    @classmethod
    def parse(cls, text: str) -> NM:
        """From "2:4". Raises ConfigError."""
        left, separator, right = text.partition(":")
        if not separator or not left.isdecimal() or not right.isdecimal() or not 0 < int(left) < int(right) <= 256:
            raise ConfigError(f"nm is {text!r}, but must be like 2:4: how many of how many inputs stay, up to 256")
        return cls(int(left), int(right))

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.group

    def check(self, inputs: int, name: str) -> None:
        """Raises ConfigError if groups do not fill a row."""
        if inputs % self.group:
            raise ConfigError(
                f"groups of {self.group} inputs do not fill the {inputs} inputs of {name}: use another nm"
            )


def num_pruned(amount: float, size: int) -> int:
    """How many of `size` weights are set to zero, rounded as `torch.nn.utils.prune` does. Raises ConfigError."""
    if not 0 <= amount < 1:
        raise ConfigError(f"amount is {amount:g}, but must be at least 0 and less than 1: the share that becomes zero")
    return round(amount * size)


def magnitude_mask(weight: torch.Tensor, amount: float) -> torch.Tensor:
    """The same mask as `torch.nn.utils.prune.L1Unstructured(amount)`, to the bit."""
    return lowest_removed(weight.abs(), num_pruned(amount, weight.numel()))


def lowest_removed(score: torch.Tensor, count: int) -> torch.Tensor:
    """False at the `count` lowest scores."""
    mask = torch.ones(score.shape, dtype=torch.bool)
    if count:
        mask.view(-1)[torch.topk(score.reshape(-1), k=count, largest=False).indices] = False
    return mask


def wanda_score(weight: torch.Tensor, mean_square: torch.Tensor) -> torch.Tensor:
    """|W| times the norm of each input. Sun et al. 2023, arXiv 2306.11695. mean_square: [in], of the inputs."""
    return weight.abs() * mean_square.clamp(min=0).sqrt()


def row_mask(score: torch.Tensor, amount: float) -> torch.Tensor:
    """The same share of every row [out, in] goes: outputs are compared with themselves only, as Wanda does."""
    mask = torch.ones(score.shape, dtype=torch.bool)
    count = num_pruned(amount, score.shape[1])
    if count:
        mask.scatter_(1, torch.topk(score, k=count, dim=1, largest=False).indices, False)
    return mask


def nm_mask(score: torch.Tensor, nm: NM) -> torch.Tensor:
    """Of every group of inputs the best stay; of equal ones those before."""
    groups = score.reshape(score.shape[0], -1, nm.group)
    best = torch.argsort(groups, dim=2, descending=True, stable=True)[..., : nm.keep]
    mask = torch.zeros(groups.shape, dtype=torch.bool)
    mask.scatter_(2, best, True)
    return mask.reshape(score.shape)


@dataclass(frozen=True, slots=True)
class GlobalCut:
    """Where magnitudes of many weights are cut: those below `threshold` go, and the first `ties` equal to it."""

    threshold: float
    ties: int

    @classmethod
    def find(cls, weights: Callable[[], Iterable[torch.Tensor]], amount: float) -> GlobalCut:
        """Over all weights together, as `torch.nn.utils.prune.global_unstructured` does, in the memory of one.

        weights: called twice. The magnitudes' bits are counted by their upper half, then those in the bucket of the cut
        by their lower half: the order of positive floats is that of their bits, so the threshold is exact.
        """
        total = 0
        counts = torch.zeros(1 << (31 - _HALF_BITS), dtype=torch.long)
        for weight in weights():
            counts += torch.bincount(_bits(weight) >> _HALF_BITS, minlength=len(counts))
            total += weight.numel()
        wanted = num_pruned(amount, total)
        if not wanted:
            return cls(0.0, 0)
        upper, before = _bucket(counts, wanted)
        lower = torch.zeros(1 << _HALF_BITS, dtype=torch.long)
        for weight in weights():
            bits = _bits(weight)
            inside = bits[bits >> _HALF_BITS == upper] & ((1 << _HALF_BITS) - 1)
            lower += torch.bincount(inside, minlength=len(lower))
        found, below = _bucket(lower, wanted - before)
        exact = torch.tensor([upper << _HALF_BITS | found], dtype=torch.int32).view(torch.float32)
        return cls(float(exact), wanted - before - below)

    def apply(self, weight: torch.Tensor) -> tuple[torch.Tensor, GlobalCut]:
        """A weight's mask, and the cut for the weight after it."""
        size = weight.abs().float()
        mask = size > self.threshold
        equal = torch.nonzero((size == self.threshold).reshape(-1)).reshape(-1)
        gone = min(self.ties, len(equal))
        mask.view(-1)[equal[gone:]] = True
        return mask, GlobalCut(self.threshold, self.ties - gone)


def _bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().abs().float().reshape(-1).view(torch.int32).long()


def _bucket(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The bucket that holds the `wanted`-th value, and how many lie in those before it."""
    ends = counts.cumsum(0)
    index = int(torch.searchsorted(ends, torch.tensor(wanted)))
    return index, int(ends[index] - counts[index])
