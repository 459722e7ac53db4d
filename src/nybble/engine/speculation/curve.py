"""c(k): what a step costs that computes k tokens of each sequence, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nybble.backends.cpu import Step
from nybble.engine.model import Model
from nybble.engine.scheduler import blocks_for

_CONTEXT = 64  # tokens of each sequence before the step


@dataclass(frozen=True, slots=True)
class CostCurve:
    """seconds[k - 1]: of a step with k tokens of each of so many sequences, the logits of all of them included."""

    num_sequences: int
    seconds: tuple[float, ...]

    def ratio(self, num_tokens: int) -> float:
        """The cost against that of a step with one token of each sequence."""
        return self.seconds[num_tokens - 1] / self.seconds[0]


def measure_curve(
    model: Model, num_sequences: int, *, longest: int = 16, rounds: int = 3, clock: Callable[[], float] = time.monotonic
) -> CostCurve:
    """Run steps of 1 to `longest` tokens of each sequence, round by round, and keep the fastest of each.

    The model gets a new cache. Its context must hold 64 + `longest` tokens.
    """
    blocks = blocks_for(_CONTEXT + longest)
    model.new_cache(num_sequences * blocks)
    tables = np.arange(num_sequences * blocks, dtype=np.int32).reshape(num_sequences, blocks)
    model.execute(_step(tables, 0, _CONTEXT, ()))
    best = [float("inf")] * longest
    for _ in range(rounds):
        for count in range(1, longest + 1):
            step = _step(tables, _CONTEXT, count, range(num_sequences * count))
            begin = clock()
            model.execute(step)
            best[count - 1] = min(best[count - 1], clock() - begin)
    return CostCurve(num_sequences, tuple(best))


def _step(tables: npt.NDArray[np.int32], context: int, count: int, rows: Sequence[int]) -> Step:
    num_sequences = len(tables)
    return Step(
        token_ids=np.arange(num_sequences * count, dtype=np.int32) % 50 + 5,
        cu_seqlens_q=np.arange(num_sequences + 1, dtype=np.int32) * count,
        context_lens=np.full(num_sequences, context, np.int32),
        block_tables=tables,
        logit_rows=np.array(rows, np.int32),
    )
