"""What is told about a request after a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from nybble.core.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestOutput
from nybble.core.sampling import RequestOutputKind
from nybble.engine.request import Request, Sequence

TokenText = Callable[[int], str | None]


def position_logprobs(
    token_id: int, logprob: float, rank: int | None, top: Iterable[tuple[int, float]], text_of: TokenText
) -> PositionLogprobs:
    """The taken token first, then the likeliest in order."""
    taken = Logprob(logprob, rank, text_of(token_id))
    entries: PositionLogprobs = {token_id: taken}
    for place, (other, value) in enumerate(top, 1):
        if other != token_id:
            entries[other] = Logprob(value, place, text_of(other))
    return entries


def request_output(request: Request) -> RequestOutput | None:
    """What is new, or everything, as the request's output_kind says; None if there is nothing to tell yet."""
    kind = request.params.output_kind
    finished = request.is_finished
    if kind is RequestOutputKind.FINAL_ONLY and not finished:
        return None
    if kind is RequestOutputKind.DELTA:
        outputs = [_delta(sequence) for sequence in request.sequences if _has_news(sequence)]
        if not outputs:
            return None
    else:
        outputs = [_everything(sequence) for sequence in request.sequences]
    for sequence in request.sequences:
        sequence.told_tokens = sequence.num_output_tokens
        sequence.told_pieces = len(sequence.output_text)
        sequence.is_told = sequence.finish_reason is not None
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=outputs,
        finished=finished,
        prompt_logprobs=request.prompt_logprobs if request.params.prompt_logprobs is not None else None,
        num_cached_tokens=request.num_cached_tokens,
        metrics=request.metrics,
        error=request.error,
        is_refused=request.is_refused,
    )


def _has_news(sequence: Sequence) -> bool:
    return sequence.told_tokens < sequence.num_output_tokens or (
        sequence.finish_reason is not None and not sequence.is_told
    )


def _everything(sequence: Sequence) -> CompletionOutput:
    if len(sequence.output_text) > 1:
        sequence.output_text = ["".join(sequence.output_text)]
    return _output(sequence, "".join(sequence.output_text), 0)


def _delta(sequence: Sequence) -> CompletionOutput:
    return _output(sequence, "".join(sequence.output_text[sequence.told_pieces :]), sequence.told_tokens)


def _output(sequence: Sequence, text: str, first_token: int) -> CompletionOutput:
    params = sequence.request.params
    wants = params.logprobs is not None
    total = sequence.cumulative_logprob
    return CompletionOutput(
        index=sequence.index,
        text=text,
        token_ids=sequence.token_ids[sequence.num_prompt_tokens + first_token :],
        cumulative_logprob=total if wants and not math.isnan(total) else None,
        logprobs=sequence.logprobs[first_token:] if wants else None,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )
