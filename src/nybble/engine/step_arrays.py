"""From what was scheduled to the arrays that a model runs on."""

from __future__ import annotations

import numpy as np

from nybble.backends.cpu import Step
from nybble.engine.adapters import step_adapters
from nybble.engine.hidden import Wanted, hidden_wanted
from nybble.engine.request import Sequence
from nybble.engine.scheduler import Scheduled, Scheduler


def build_step(scheduled: Scheduled, drawing: list[Sequence], scheduler: Scheduler) -> tuple[Step, list[Wanted]]:
    """The arrays of a step, and of which tokens (sequence, first position, count) hidden states are wanted.

    drawing: the sequences that get a token, in the order of the rows of logits.
    """
    token_ids: list[int] = []
    cu_seqlens_q = [0]
    logit_rows: list[int] = []
    hidden_rows: list[int] = []
    hidden: list[Wanted] = []
    draws = set(map(id, drawing))
    for sequence, num_tokens in scheduled:
        begin, row = sequence.num_computed_tokens, len(token_ids)
        token_ids += sequence.token_ids[begin : begin + num_tokens]
        last = len(token_ids) - 1
        token_ids += sequence.guesses
        cu_seqlens_q.append(len(token_ids))
        if id(sequence) in draws:  # all samples of a prompt start from the same logits
            samples = 1 if sequence.request.is_forked else len(sequence.request.sequences)
            logit_rows += [last] * samples
            logit_rows += range(last + 1, len(token_ids))
        first, count = hidden_wanted(sequence, begin, num_tokens)
        if count:
            hidden_rows += range(row + first - begin, row + first - begin + count)
            hidden.append((sequence, first, count))
    sequences = [sequence for sequence, _ in scheduled]
    adapters, adapter_of = step_adapters(sequences)
    step = Step(
        token_ids=np.array(token_ids, np.int32),
        cu_seqlens_q=np.array(cu_seqlens_q, np.int32),
        context_lens=np.array([s.num_computed_tokens for s in sequences], np.int32),
        block_tables=scheduler.block_tables(sequences),
        logit_rows=np.array(logit_rows, np.int32),
        hidden_rows=np.array(hidden_rows, np.int32) if hidden_rows else None,
        adapters=adapters,
        adapter_of=adapter_of,
    )
    return step, hidden
