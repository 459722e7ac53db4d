"""From a model on disk to an engine that is ready for requests."""

from __future__ import annotations

from pathlib import Path

from nybble.core.sampling import StructuredOutputsParams
from nybble.engine.adapters import AdapterShelf
from nybble.engine.core import EngineCore
from nybble.engine.grammar import GrammarCompiler
from nybble.engine.load import LoadedModel, load_model
from nybble.engine.options import EngineOptions, cache_blocks
from nybble.engine.prefix_file import open_prefix_cache
from nybble.engine.prepare import Compiler
from nybble.engine.request import Matcher
from nybble.engine.roofline import model_cost
from nybble.engine.scheduler import PREFILL_BESIDE_DECODE
from nybble.engine.speculation.load_draft import load_draft


def start_engine(path: Path, options: EngineOptions) -> tuple[LoadedModel, EngineCore]:
    """Load a model and make its engine.

    Raises:
        ModelNotFoundError: an adapter is not there.
        CheckpointError: a file is missing, damaged or not supported.
        TokenizerError: its tokenizer is, or does not belong to it.
        ConfigError: the draft model does not fit it, an option cannot be used, or there is no memory for the cache.
    """
    loaded = load_model(
        path,
        threads=options.threads,
        context=options.max_model_len,
        kv_cache_type=options.kv_cache_type,
        placement=options.placement(),
    )
    if options.draft is not None:
        loaded.draft = load_draft(options.draft, loaded, threads=options.threads)
    return loaded, engine_for(loaded, options)


def engine_for(loaded: LoadedModel, options: EngineOptions) -> EngineCore:
    """The engine of a model that is loaded already, with the adapters that the options name.

    Raises:
        ModelNotFoundError, CheckpointError: an adapter is not there, damaged, or made for another model.
        ConfigError: there is no memory for the cache, or for an adapter.
    """
    budget = options.token_budget(on_gpu=loaded.on_gpu)
    own_bytes = bytes_per_block = loaded.model.cache_bytes_per_block
    if loaded.draft is not None:  # its cache has as many blocks
        bytes_per_block += loaded.draft.cache_bytes_per_block

    def gpu_bytes() -> int | None:
        fitting = loaded.model.fitting_blocks(max_num_batched_tokens=budget, max_num_seqs=options.max_num_seqs)
        return None if fitting is None else fitting * own_bytes

    blocks = cache_blocks(options, context=loaded.context, bytes_per_block=bytes_per_block, gpu_bytes=gpu_bytes)
    kept_in = open_prefix_cache(loaded, options.prefix_cache_file, options.prefix_cache_size)
    adapters = AdapterShelf(load=loaded.model.load_adapter, spec=loaded.checkpoint.spec, max_rank=options.max_lora_rank)
    for path in options.adapters:
        adapters.load(path)
    return EngineCore(
        loaded.model,
        loaded.tokenizer,
        context=loaded.context,
        vocab_size=loaded.checkpoint.spec.vocab_size,
        num_blocks=blocks,
        eos_token_ids=loaded.eos_token_ids,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=budget,
        enable_prefix_caching=options.enable_prefix_caching,
        seed=options.seed,
        compile_grammar=_compiler(loaded),
        cost=model_cost(loaded.checkpoint),
        speculate=options.speculate,
        draft=loaded.draft,
        kept_in=kept_in,
        adapters=adapters,
        prefill_beside_decode=budget if loaded.on_gpu else PREFILL_BESIDE_DECODE,
    )


def _compiler(loaded: LoadedModel) -> Compiler:
    compiler = GrammarCompiler(loaded.tokenizer, loaded.checkpoint.spec.vocab_size, loaded.eos_token_ids)

    def compile_grammar(params: StructuredOutputsParams) -> Matcher:
        return compiler.compile(params)

    return compile_grammar
