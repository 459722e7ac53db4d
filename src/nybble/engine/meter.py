"""What the steps of an engine had to read and compute, and how long they took."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from nybble.backends.cpu import Step
from nybble.engine.roofline import ModelCost


@dataclass(frozen=True, slots=True)
class Work:
    """Totals since the start. Bytes and operations are the least that the steps can do with, as ModelCost counts."""

    seconds: float = 0.0
    num_bytes: int = 0
    operations: int = 0


class StepMeter:
    """Adds up steps. Without a cost, only their time."""

    def __init__(self, cost: ModelCost | None) -> None:
        self._cost = cost
        # Most layers are alike: one sum for each kind of them.
        self._kv = Counter[int | None]()
        for size, window in cost.kv_layers if cost else ():
            self._kv[window] += size
        self.work = Work()

    def add(self, step: Step, seconds: float) -> None:
        """A step that took so long in the model."""
        done, cost = self.work, self._cost
        if cost is None:
            self.work = Work(done.seconds + seconds)
            return
        contexts = (step.context_lens + step.cu_seqlens_q[1:] - step.cu_seqlens_q[:-1]).tolist()
        num_bytes = cost.weight_bytes
        for window, size in self._kv.items():
            num_bytes += size * sum(contexts if window is None else (min(length, window) for length in contexts))
        operations = cost.operations(len(step.token_ids), len(step.logit_rows))
        self.work = Work(done.seconds + seconds, done.num_bytes + num_bytes, done.operations + operations)


def fraction(before: Work, after: Work, read_gb_s: float, int8_gops: float) -> float:
    """Of the roofline, between two moments; 0 where nothing ran. See nybble.engine.roofline.DEFINITION."""
    seconds = after.seconds - before.seconds
    if seconds <= 0:
        return 0.0
    return max(
        (after.num_bytes - before.num_bytes) / seconds / (read_gb_s * 1e9),
        (after.operations - before.operations) / seconds / (int8_gops * 1e9),
    )
