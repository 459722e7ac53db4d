"""The engine: requests in, tokens out, one step of the model at a time. It belongs to one thread."""

from __future__ import annotations

import logging
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

from nybble.backends.cpu import BadLogitsError, Sampled
from nybble.cache.block_file import BlockFile
from nybble.cache.block_pool import BLOCK_SIZE, BlockPool
from nybble.core.errors import ConfigError, NybbleError
from nybble.core.outputs import FinishReason, RequestOutput
from nybble.core.sampling import SamplingParams
from nybble.engine.adapters import AdapterShelf, together
from nybble.engine.draw import Drawer
from nybble.engine.hidden import HiddenUser
from nybble.engine.kept_prefixes import KeptPrefixes
from nybble.engine.meter import StepMeter, Work
from nybble.engine.model import EngineModel, EngineTokenizer, Logits
from nybble.engine.prepare import Compiler, Limits, RequestMaker
from nybble.engine.request import Pooling, Request, Sequence
from nybble.engine.roofline import ModelCost
from nybble.engine.scheduler import PREFILL_BESIDE_DECODE, Scheduled, Scheduler, blocks_for
from nybble.engine.speculation.draft_model import DraftModel, DraftWeights
from nybble.engine.speculation.mode import parse_mode
from nybble.engine.speculation.speculator import SpeculationStats, Speculator
from nybble.engine.step_arrays import build_step
from nybble.engine.tell import position_logprobs, request_output

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at this moment, and totals since it started."""

    num_running: int
    num_waiting: int
    num_blocks: int
    kv_usage: float  # share of the blocks that running sequences use
    kv_waste: float  # share of their memory that holds no token
    prefix_queries: int  # prompt tokens
    prefix_hits: int  # of them
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    work: Work
    speculation: SpeculationStats
    prefix_restored: int = 0  # tokens of prompts that came back from the prefix cache's file


class EngineCore:
    """Many requests on one model.

    What a request gets does not depend on the others: not on what is batched with it, how its prompt is cut, whether
    its prefix was cached or it had to be computed again.

    Raises:
        ConfigError: there is no memory for the cache.
    """

    def __init__(
        self,
        model: EngineModel,
        tokenizer: EngineTokenizer | None,
        *,
        context: int,
        vocab_size: int,
        num_blocks: int,
        eos_token_ids: frozenset[int] = frozenset(),
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        enable_prefix_caching: bool = True,
        seed: int | None = None,
        compile_grammar: Compiler | None = None,
        cost: ModelCost | None = None,
        speculate: str = "off",
        draft: DraftWeights | None = None,
        kept_in: BlockFile | None = None,
        adapters: AdapterShelf | None = None,
        prefill_beside_decode: int = PREFILL_BESIDE_DECODE,
    ) -> None:
        if context < 1:
            raise ConfigError(f"the context must hold at least one token, not {context}")
        self.context = context
        self.eos_token_ids = eos_token_ids
        self._model = model
        self._tokenizer = tokenizer
        self._maker = RequestMaker(
            Limits(context, vocab_size, num_blocks, max_num_seqs),
            tokenizer=tokenizer,
            eos_token_ids=eos_token_ids,
            compile_grammar=compile_grammar,
            seed=seed,
        )
        self.pool = BlockPool(num_blocks)
        model.new_cache(num_blocks)
        self._kept = None if kept_in is None else KeptPrefixes(kept_in, model.cache_blocks(), self.pool)
        if self._kept is not None:
            self._close_file = weakref.finalize(self, self._kept.close)  # at the latest when the process ends
        self._scheduler = Scheduler(
            self.pool,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_blocks_per_seq=blocks_for(context),
            enable_prefix_caching=enable_prefix_caching,
            kept=self._kept,
            prefill_beside_decode=prefill_beside_decode,
        )
        self._hidden = HiddenUser(model, self._token_text, self._fail)
        self._meter = StepMeter(cost)
        self._drawer = Drawer(model, self._fail)
        drafter = None if draft is None else DraftModel(draft, num_blocks=num_blocks, vocab_size=vocab_size)
        self._speculator = Speculator(
            parse_mode(speculate),
            self._scheduler,
            max_num_batched_tokens,
            row_weight=0.0 if cost is None else cost.row_weight,
            drafter=drafter,
        )
        self.adapters = AdapterShelf() if adapters is None else adapters
        self._requests: dict[str, Request] = {}
        self._ended: list[Request] = []  # between steps, by abort()
        self._arrivals = 0
        self._prompt_tokens = 0
        self._generation_tokens = 0
        if drafter is not None:
            drafter.measure()

    # ---- requests ----

    def make_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        priority: int = 0,
        cache_salt: str | None = None,
        adapter: str | None = None,
        pooling: Pooling | None = None,
    ) -> Request:
        """Check a request, and prepare what takes time. Safe on any thread.

        adapter: what `load_adapter` gave.

        Raises:
            PromptError: the prompt is empty or too long, or holds an unknown token.
            ConfigError: a parameter does not fit this model, or no such adapter is loaded.
        """
        return self._maker.make(
            request_id,
            prompt_token_ids,
            params,
            prompt=prompt,
            priority=priority,
            cache_salt=cache_salt,
            adapter=None if adapter is None else self.adapters.get(adapter),
            pooling=pooling,
        )

    def add_request(self, request: Request) -> None:
        """Queue what make_request gave.

        Raises:
            ConfigError: a request with this id is under way.
        """
        if request.request_id in self._requests:
            raise ConfigError(f"a request with the id {request.request_id!r} is already under way")
        request.arrival = self._arrivals
        self._arrivals += 1
        self._requests[request.request_id] = request
        self._scheduler.add(request.sequences[0])

    def abort(self, request_id: str) -> None:
        """End a request; its blocks are free at once. Nothing happens if it is not under way."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, "abort")
            self._ended.append(request)

    def load_adapter(self, path: str | Path) -> str:
        """Make a LoRA ready for requests; the id to name it by. What is loaded already is not loaded again.

        Safe on any thread, while steps run. See docs/lora.md for what is supported.

        Raises:
            ModelNotFoundError: there is nothing at `path`.
            CheckpointError: it is damaged, not supported, or made for another model.
            ConfigError: its rank is above max_lora_rank, or there is not enough memory.
        """
        return self.adapters.load(path)

    def unload_adapter(self, adapter: str) -> None:
        """Let go of an adapter. Requests that have it go on with it; its memory is free when the last one ends.

        Raises:
            ConfigError: no such adapter is loaded.
        """
        self.adapters.unload(adapter)

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._requests or self._ended)

    def stats(self) -> EngineStats:
        """Figures of this moment. May be called from another thread: they are then those of some moment nearby."""
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=self.pool.num_blocks,
            kv_usage=self.pool.num_used / self.pool.num_blocks,
            kv_waste=scheduler.waste,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            work=self._meter.work,
            speculation=self._speculator.stats,
            prefix_restored=scheduler.restored_blocks * BLOCK_SIZE,
        )

    def close(self) -> None:
        """Write what the prefix cache's file lacks, if there is one, and let go of it. No step may run meanwhile."""
        if self._kept is not None:
            self._close_file()

    def check_integrity(self) -> None:
        """Every block is accounted for, and with nothing under way all of them are free.

        Raises:
            AssertionError: it is not so.
        """
        self.pool.check_integrity()
        if not self._requests and self.pool.num_used:
            raise AssertionError(f"{self.pool.num_used} blocks are in use though no request is under way")

    # ---- a step ----

    def step(self) -> list[RequestOutput]:
        """Run the model once and tell what is new. An error inside of a request ends that request only."""
        if self._kept is None:
            return self._step()
        with self._kept.turn:
            outputs = self._step()
        self._kept.rest()
        return outputs

    def _step(self) -> list[RequestOutput]:
        changed, self._ended = self._ended, []
        scheduled = self._scheduler.schedule()
        if scheduled:
            together(scheduled)
            now = time.monotonic()
            for sequence, _ in scheduled:
                if sequence.request.metrics.first_scheduled_time is None:
                    sequence.request.metrics.first_scheduled_time = now
            self._speculator.plan(scheduled)
            self._run(scheduled)
            changed += dict.fromkeys(sequence.request for sequence, _ in scheduled)
        outputs = []
        for request in changed:
            if request.is_finished:
                self._forget(request)
            output = request_output(request)
            if output is not None:
                outputs.append(output)
        return outputs

    def _run(self, scheduled: Scheduled) -> None:
        """Run what was scheduled. If the model refuses it, each sequence shows alone whether it is the one."""
        drawing = [s for s, n in scheduled if n == s.num_missing_tokens and s.request.pooling is None]
        try:
            step, wanted = build_step(scheduled, drawing, self._scheduler)
            begin = time.monotonic()
            logits = self._model.execute(step)
            seconds = time.monotonic() - begin
            states = self._model.hidden() if wanted else None
        except Exception as error:  # nothing has changed yet but cells of the cache, which will be written again
            if len(scheduled) == 1:
                self._fail(scheduled[0][0].request, error)
                return
            logger.warning("a step of %d sequences failed, they go on one by one: %s", len(scheduled), error)
            for sequence, num_tokens in scheduled:
                sequence.guesses = []
                if sequence.finish_reason is None:
                    self._run([(sequence, num_tokens)])
            return
        self._meter.add(step, seconds)
        self._speculator.ran(len(step.token_ids), len(step.logit_rows), seconds)
        begins = [sequence.num_computed_tokens for sequence, _ in scheduled]
        self._scheduler.computed(scheduled)
        self._prompt_tokens += sum(
            max(min(begin + n, s.num_prompt_tokens) - begin, 0) for (s, n), begin in zip(scheduled, begins, strict=True)
        )
        if states is not None:
            self._hidden.use(wanted, states)
        drawing = self._fork(drawing)
        if drawing:
            self._speculator.learn_all(self._draw(drawing, logits), len(step.token_ids), seconds)
        for sequence, _ in scheduled:
            if (
                sequence.request.pooling is not None
                and sequence.num_missing_tokens == 0
                and sequence.finish_reason is None
            ):
                self._finish(sequence, "stop")

    def _fork(self, drawing: list[Sequence]) -> list[Sequence]:
        """The sequences that get a token, one for each row of logits: the other samples of a prompt behind the first.

        Those that ended in this very step are among them.
        """
        everyone: list[Sequence] = []
        for sequence in drawing:
            request = sequence.request
            if request.is_forked or len(request.sequences) == 1:
                everyone.append(sequence)
                continue
            everyone += request.sequences
            if sequence.finish_reason is None:
                copies = self._scheduler.fork(sequence, request.sequences[1:])
                try:
                    if copies:
                        self._model.copy_blocks(copies)
                except Exception as error:
                    self._fail(request, error)
        return everyone

    def _draw(self, drawing: list[Sequence], logits: Logits) -> list[tuple[Sequence, int]]:
        """One token for each sequence, and one more for each of its guesses that was right.

        Returns each sequence with the number of its right guesses.
        """
        places, right, row = [], dict.fromkeys(drawing, 0), 0
        for sequence in drawing:
            places.append((row, sequence))
            row += 1 + len(sequence.guesses)
        while places:
            drawn, places = self._drawer.draw(logits, places), []
            for row, sequence, token in drawn:
                if sequence.finish_reason is not None:  # another sample of the request failed
                    continue
                try:
                    self._accept(sequence, token)
                except Exception as error:
                    self._fail(sequence.request, error)
                done = right[sequence]
                if sequence.finish_reason is None and sequence.guesses[done : done + 1] == [token.token_id]:
                    right[sequence] += 1
                    self._scheduler.computed([(sequence, 1)])  # its keys and values are in the cache already
                    places.append((row + 1, sequence))
        return list(right.items())

    def _accept(self, sequence: Sequence, drawn: Sampled) -> None:
        token_id, request = drawn.token_id, sequence.request
        params = request.params
        sequence.token_ids.append(token_id)
        self._generation_tokens += 1
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = time.monotonic()
        if params.logprobs is not None:
            sequence.cumulative_logprob += drawn.logprob
            sequence.logprobs.append(
                position_logprobs(token_id, drawn.logprob, drawn.rank, drawn.top_logprobs, self._token_text)
            )
        is_end = token_id in self.eos_token_ids and not params.ignore_eos
        if sequence.matcher is not None and not sequence.matcher.accept(token_id) and not is_end:
            self._fail(request, NybbleError("the grammar does not allow the token that was drawn"))
            return
        is_stop = token_id in (params.stop_token_ids or ())
        if params.detokenize and not is_end and (not is_stop or params.include_stop_str_in_output):
            # Before min_tokens no stop string counts.
            sequence.output_text.append(
                sequence.text.push(token_id, look_for_stop=sequence.num_output_tokens >= params.min_tokens)
            )
        if is_end or is_stop:
            sequence.stop_reason = token_id if is_stop else None
            self._finish(sequence, "stop")
        elif sequence.text.stopped:
            sequence.stop_reason = sequence.text.stopped_by
            self._finish(sequence, "stop")
        elif len(sequence.token_ids) >= sequence.max_total_tokens:
            self._finish(sequence, "length")
        elif (
            sequence.matcher is not None
            and (params.ignore_eos or not self.eos_token_ids)  # otherwise the end token follows
            and sequence.matcher.is_finished()
        ):
            self._finish(sequence, "stop")

    # ---- ends ----

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self._scheduler.remove(sequence)
        self._speculator.end(sequence)
        if sequence.request.params.detokenize:
            try:
                sequence.output_text.append(sequence.text.flush())
            except Exception as error:
                sequence.finish_reason = "error"
                self._fail(sequence.request, error)

    def _end(self, request: Request, reason: FinishReason) -> None:
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self._finish(sequence, reason)
        self._forget(request)

    def _fail(self, request: Request, error: Exception) -> None:
        if not isinstance(error, NybbleError | BadLogitsError):
            logger.error("request %s failed", request.request_id, exc_info=error)
        if request.error is None:
            request.error = str(error) or type(error).__name__
            request.is_refused = isinstance(error, ConfigError)
        self._end(request, "error")

    def _forget(self, request: Request) -> None:
        request.metrics.finished_time = request.metrics.finished_time or time.monotonic()
        self._requests.pop(request.request_id, None)

    # ---- small things ----

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token_id], skip_special=False)
