"""`LLM`: many prompts at once from Python, with the names that vLLM's users know."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nybble.compress.api import Config
from nybble.compress.on_load import quantised
from nybble.core.errors import ConfigError, PromptError, TokenizerError
from nybble.core.lora import LoRARequest
from nybble.core.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from nybble.core.sampling import RequestOutputKind, SamplingParams
from nybble.engine.beam_search import BeamSearchOutput, BeamSearchParams, search
from nybble.engine.core import EngineStats
from nybble.engine.embedding import unit_vector
from nybble.engine.lora_cache import LoraCache
from nybble.engine.options import EngineOptions, KvCacheType
from nybble.engine.prefix_file import default_place
from nybble.engine.request import Pooling, Request
from nybble.engine.speculation.mode import parse_mode
from nybble.engine.start import start_engine
from nybble.store import resolve
from nybble.tokenizer import ChatTemplate, Tokenizer, render_to_ids

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
LoRAs = LoRARequest | Sequence[LoRARequest | None] | None

_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


class LLM:
    """A model and its engine, for offline use. One thread at a time.

    model: a path (GGUF file or Hugging Face folder) or a name of the catalog. max_model_len: the longest sequence in
    tokens (the model's own limit, at most 8192). device: "cpu", "cuda", "cuda:N", "torch-cpu" or "auto", a GPU if one
    can be used, else the CPU; with dtype, tensor_parallel_size, gpu_memory_utilization, enforce_eager and device_map
    for torch and GPUs, see docs/gpu.md. max_num_batched_tokens: of one step, by default 512 on the CPU and 4096 on a
    GPU. kv_cache_memory: bytes of the cache, or "4GiB"; by default half of the free memory, or what
    gpu_memory_utilization leaves of a GPU's. kv_cache_type: "int8" holds twice as many tokens in it as "f16".
    quantization: a type of `nybble quantize` or a config of `nybble.quantize`, to quantise the model while it is
    loaded. speculate: "auto", "ngram", "off", or "draft=MODEL" with a smaller model or "self:q2_k", see
    docs/speculation.md. prefix_cache_file: True or a path keeps the prefix cache for the next LLM of this model, in at
    most prefix_cache_size; see docs/prefix-cache.md.
    threads: of the computation. seed: of requests that have none. enable_lora: whether `lora_request` is taken.
    max_loras: how many adapters stay in memory, the least recently used leaves first. max_lora_rank: what one may have.

    Raises:
        ModelNotFoundError, StoreError: there is no such model, or it could not be fetched.
        CheckpointError, TokenizerError: it is damaged or not supported.
        ConfigError: an option cannot be used.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        kv_cache_memory: int | str | None = None,
        kv_cache_type: KvCacheType = "f16",
        enable_prefix_caching: bool = True,
        speculate: str = "auto",
        prefix_cache_file: bool | str | Path = False,
        prefix_cache_size: int | str = "1GiB",
        seed: int | None = None,
        threads: int | None = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float | None = None,
        dtype: str = "auto",
        device: str = "auto",
        enforce_eager: bool = False,
        device_map: str | None = None,
        quantization: Config | str | None = None,
        enable_lora: bool = True,
        max_loras: int | None = None,
        max_lora_rank: int | None = None,
        **others: Any,
    ) -> None:
        if others:
            raise ConfigError(f"LLM has no option {next(iter(others))!r}: leave it out")
        mode = parse_mode(speculate)
        sizes = EngineOptions(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=kv_cache_memory,
            kv_cache_type=kv_cache_type,
            enable_prefix_caching=enable_prefix_caching,
            threads=threads,
            seed=seed,
            prefix_cache_file=prefix_cache_file,
            prefix_cache_size=prefix_cache_size,
            max_lora_rank=max_lora_rank,
            device=device,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            device_map=device_map,
        )
        # Before anything is fetched, so that what is wrong is said at once.
        if not sizes.resolved_device().startswith("cuda") and gpu_memory_utilization is not None:
            logger.info("gpu_memory_utilization does not apply on the CPU: kv_cache_memory sets the cache")
        path = resolve(model, announce=logger.info)
        if prefix_cache_file is True:
            sizes = replace(sizes, prefix_cache_file=default_place(path))  # not beside what `quantised` makes
        with ExitStack() as stack:
            source = stack.enter_context(quantised(path, quantization, threads=threads))
            draft = None
            if mode.needs_draft:
                draft = source if mode.draft is None else resolve(mode.draft, announce=logger.info)
                draft = stack.enter_context(quantised(draft, mode.draft_type, threads=threads))
            options = replace(sizes, speculate=speculate, draft=draft)
            self._loaded, self._core = start_engine(source, options)
        self._ids = itertools.count()
        self._loras = LoraCache(self._core, max_loras=max_loras) if enable_lora else None

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._loaded.tokenizer

    def engine_stats(self) -> EngineStats:
        """Figures of the engine at this moment, and totals since it started."""
        return self._core.stats()

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses if it is given none."""
        return SamplingParams()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        lora_request: LoRAs = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """The answers to all prompts, in their order.

        prompts: one or several, each a text, its token ids, or a dictionary with `prompt` or `prompt_token_ids` (and
        `cache_salt`). sampling_params: for all, or one for each. use_tqdm: a progress bar for several prompts.
        lora_request: an adapter for all, or one (or None) for each. priority: one for each prompt; lower ones go first.

        Raises:
            PromptError: a prompt is empty or too long. Nothing has run then.
            ConfigError: the parameters do not fit.
            ModelNotFoundError, CheckpointError: an adapter is not there, damaged, or made for another model.
        """
        many = _as_list(prompts)
        params = _for_each(sampling_params or self.get_default_sampling_params(), len(many), "sampling parameters")
        priorities = [0] * len(many) if priority is None else list(priority)
        if len(priorities) != len(many):
            raise ConfigError(f"{len(many)} prompts came with {len(priorities)} priorities")
        adapters = self._adapters(lora_request, len(many))
        requests = [
            self._request(prompt, row, number, adapter=adapter)
            for prompt, row, number, adapter in zip(many, params, priorities, adapters, strict=True)
        ]
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: LoRAs = None,
    ) -> list[RequestOutput]:
        """The answers to one conversation, or to several: lists of messages with `role` and `content`.

        Raises:
            TokenizerError: there is no chat template, or it does not take these messages.
            PromptError, ConfigError: as `generate` does.
        """
        one = not messages or isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if one else list(messages)
        template = self._template(chat_template)
        checkpoint = self._loaded.checkpoint
        variables: dict[str, Any] = dict(chat_template_kwargs or {})
        if tools is not None:
            variables["tools"] = list(tools)
        prompts = [
            render_to_ids(
                template,
                self._loaded.tokenizer,
                [dict(message) for message in conversation],
                add_generation_prompt=add_generation_prompt,
                bos_token_id=checkpoint.bos_token_id if checkpoint.add_bos else None,
                **variables,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm, lora_request=lora_request)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams, *, lora_request: LoRARequest | None = None
    ) -> list[BeamSearchOutput]:
        """For each prompt the likeliest continuations that a search of this width finds, best first.

        Raises:
            PromptError, ConfigError: as `generate` does.
        """

        [adapter] = self._adapters(lora_request, 1)

        def step(sequences: list[list[int]], row: SamplingParams) -> list[RequestOutput]:
            return self._run([self._request(tokens, row, 0, adapter=adapter) for tokens in sequences], False)

        starts = [self._token_ids(prompt)[0] for prompt in _as_list(prompts)]
        tokenizer = self._loaded.tokenizer
        return [
            search(
                start,
                params,
                step=step,
                decode=lambda ids: tokenizer.decode(ids),
                eos_token_ids=self._core.eos_token_ids,
                context=self._core.context,
            )
            for start in starts
        ]

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: bool = True,
        *,
        pooling: Pooling = "mean",
        lora_request: LoRAs = None,
    ) -> list[EmbeddingRequestOutput]:
        """A vector of length 1 for each text: the mean of the last hidden states, or the last token's.

        Raises:
            PromptError: a text is empty or too long.
        """
        many = _as_list(prompts)
        adapters = self._adapters(lora_request, len(many))
        requests = [
            self._request(prompt, SamplingParams(), 0, adapter=adapter, pooling=pooling)
            for prompt, adapter in zip(many, adapters, strict=True)
        ]
        outputs = self._run(requests, use_tqdm)
        return [
            EmbeddingRequestOutput(
                output.request_id,
                output.prompt_token_ids,
                EmbeddingOutput(unit_vector(request, output.error).tolist()),
            )
            for request, output in zip(requests, outputs, strict=True)
        ]

    # ---- inside ----

    def _adapters(self, lora_request: LoRAs, count: int) -> list[str | None]:
        """The id of each prompt's adapter, all of them loaded."""
        given = (
            [lora_request] * count if lora_request is None or isinstance(lora_request, LoRARequest) else lora_request
        )
        if len(given) != count:
            raise ConfigError(f"{count} prompts came with {len(given)} adapters")
        if not any(given):
            return [None] * count
        if self._loras is None:
            raise ConfigError("lora_request was given, but this LLM was made with enable_lora=False")
        return self._loras.ids(given)

    def _request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int,
        *,
        adapter: str | None = None,
        pooling: Pooling | None = None,
    ) -> Request:
        token_ids, text, salt = self._token_ids(prompt)
        return self._core.make_request(
            str(next(self._ids)),
            token_ids,
            replace(params, output_kind=RequestOutputKind.FINAL_ONLY),
            prompt=text,
            priority=priority,
            cache_salt=salt,
            adapter=adapter,
            pooling=pooling,
        )

    def _token_ids(self, prompt: Prompt) -> tuple[list[int], str | None, str | None]:
        """Token ids, text and cache salt of a prompt."""
        salt = None
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - _PROMPT_KEYS
            if unknown or ("prompt" in prompt) == ("prompt_token_ids" in prompt):
                raise PromptError(
                    f"a prompt has either prompt or prompt_token_ids (and cache_salt), not {prompt!r:.60}"
                )
            salt = prompt.get("cache_salt")
            prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
        if isinstance(prompt, str):
            return self._loaded.tokenizer.encode(prompt, add_special=True), prompt, salt
        if isinstance(prompt, Sequence) and all(isinstance(i, int) for i in prompt):
            return [int(i) for i in prompt], None, salt
        raise PromptError(f"a prompt is a text, its token ids or a dictionary, not {prompt!r:.80}")

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        for request in requests:
            self._core.add_request(request)
        try:
            with _progress(len(requests), use_tqdm) as advance:
                while self._core.has_unfinished_requests:
                    for output in self._core.step():
                        outputs[output.request_id] = output
                        advance()
        finally:
            for request in requests:  # after Ctrl-C; otherwise all of them have ended
                self._core.abort(request.request_id)
        return [outputs[request.request_id] for request in requests]

    def _template(self, given: str | None) -> ChatTemplate:
        source = given or self._loaded.checkpoint.chat_template
        if source is None:
            raise TokenizerError(
                "this model has no chat template, it was not made for chats: give chat_template, or use generate"
            )
        tokenizer = self._loaded.tokenizer
        return ChatTemplate(source, bos_token=tokenizer.bos_token or "", eos_token=tokenizer.eos_token or "")


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # the token ids of one prompt
    return list(prompts)


def _for_each(params: SamplingParams | Sequence[SamplingParams], count: int, what: str) -> list[SamplingParams]:
    rows = [params] * count if isinstance(params, SamplingParams) else list(params)
    if len(rows) != count:
        raise ConfigError(f"{count} prompts came with {len(rows)} {what}")
    return rows


@contextmanager
def _progress(count: int, wanted: bool) -> Iterator[Any]:
    """Calls it for each prompt that has its answer."""
    console = Console(stderr=True)
    if not wanted or count < 2 or not console.is_terminal:
        yield lambda: None
        return
    columns = (
        TextColumn("prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("prompts", total=count)
        yield lambda: bar.advance(task)
