"""Prompts in, tokens out, step by step: the engine for callers that hold all their prompts and want to watch."""

from __future__ import annotations

import itertools
from collections.abc import Generator as GeneratorType
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nybble.core.errors import ConfigError
from nybble.core.outputs import FinishReason, PositionLogprobs, RequestOutput
from nybble.core.sampling import RequestOutputKind, SamplingParams
from nybble.engine.core import EngineCore


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one prompt."""

    index: int  # which prompt it belongs to
    token_id: int
    text: str  # what may be shown now; empty while a character or a stop string is undecided
    finish_reason: FinishReason | None = None  # not None: this was the last one of its prompt
    logprobs: PositionLogprobs | None = None  # if log-probabilities were asked for
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache


# Closing it early ends all prompts and gives their blocks back.
Steps = GeneratorType[list[TokenEvent], None, None]


class Generator:
    """Runs an engine that nobody else uses. adapter: of all its prompts."""

    def __init__(self, core: EngineCore, *, adapter: str | None = None) -> None:
        self.core = core
        self._adapter = adapter
        self._calls = itertools.count()

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]) -> Steps:
        """The events of each step, for all prompts that got a token in it; none while prompts are still read.

        Raises:
            PromptError: a prompt is empty, or longer than the context. It is raised before anything runs.
            ConfigError: there is not one SamplingParams for each prompt, or one of them asks for several samples.
        """
        rows = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(rows) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts came with {len(rows)} sets of sampling parameters")
        if any(row.n != 1 for row in rows):
            raise ConfigError("one sample of each prompt can be watched, not n > 1")
        call = next(self._calls)
        prepared = [
            self.core.make_request(
                f"{call}/{index}",
                list(prompt),
                replace(row, output_kind=RequestOutputKind.DELTA),
                adapter=self._adapter,
            )
            for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]
        for one in prepared:
            self.core.add_request(one)
        return self._run([request.request_id for request in prepared])

    def _run(self, request_ids: list[str]) -> Steps:
        try:
            while self.core.has_unfinished_requests:
                yield [event for output in self.core.step() for event in _events(output)]
        finally:
            for request_id in request_ids:
                self.core.abort(request_id)
            if self.core.has_unfinished_requests:
                self.core.step()  # hears of the ends


def _events(output: RequestOutput) -> list[TokenEvent]:
    if output.error is not None:
        raise RuntimeError(output.error)
    index = int(output.request_id.rpartition("/")[2])
    return [
        TokenEvent(
            index,
            sample.token_ids[0],
            sample.text,
            sample.finish_reason,
            sample.logprobs[0] if sample.logprobs else None,
            output.num_cached_tokens or 0,
        )
        for sample in output.outputs
        if sample.token_ids
    ]
