"""`nybble run`: one answer, or a chat."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from nybble.backends.device import DeviceOptions, resolve_device
from nybble.cli.answer import Figures, note, note_ending, show_answer
from nybble.cli.chat import chat
from nybble.cli.markdown import import_early, writer_for_terminal
from nybble.cli.named import Named, find_named, not_followed, sampling, speculation
from nybble.cli.options import (
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    EagerOption,
    GpuMemoryOption,
    KvCacheTypeOption,
    ModelArgument,
    PrefixCacheFileOption,
    PrefixCacheSizeOption,
    SpeculateOption,
    TensorParallelOption,
    ThreadsOption,
    draft_weights,
    prefix_cache,
)
from nybble.cli.prompt import Message, as_text, chat_prompt, given_prompt, raw_prompt
from nybble.cli.session import Session
from nybble.core.errors import ConfigError
from nybble.engine.load import LoadedModel, load_model
from nybble.engine.options import parse_kv_type
from nybble.engine.prefix_file import open_prefix_cache
from nybble.engine.scheduler import blocks_for
from nybble.engine.speculation.load_draft import load_draft
from nybble.engine.speculation.mode import parse_mode


def run(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask. Without it: standard input if that is piped, an interactive chat if not."),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="The longest answer, in tokens; by default the model's own, or 1024.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 always takes the likeliest token; by default the model's own, or 0.7.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that make up this probability; 0.95.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens; 0: from all.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out tokens below this fraction of the likeliest one; 0.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the answer repeatable; by default every one differs.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message that a chat begins with.")] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="A LoRA for the model: a PEFT folder, or a GGUF file. It takes the place of the model's own."
        ),
    ] = None,
    threads: ThreadsOption = None,
    ctx: Annotated[
        int | None, typer.Option(help="Tokens of context; by default 8192, or the model's own limit if that is less.")
    ] = None,
    kv_cache_type: KvCacheTypeOption = "f16",
    speculate: SpeculateOption = None,
    prefix_cache_file: PrefixCacheFileOption = "off",
    prefix_cache_size: PrefixCacheSizeOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    tensor_parallel_size: TensorParallelOption = 1,
    gpu_memory_utilization: GpuMemoryOption = None,
    enforce_eager: EagerOption = False,
    device_map: DeviceMapOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown/--plain", help="Render Markdown on a terminal, or show it as it comes.")
    ] = True,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print a line of figures after each answer (to standard error).")
    ] = False,
) -> None:
    """Ask a model, or chat with it."""
    values = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed,
        "max_tokens": max_tokens,
    }  # fmt: skip
    given = {name: value for name, value in values.items() if value is not None}
    sampling({}, given)  # a wrong option says so before a model is fetched
    if raw and system is not None:
        raise ConfigError("--system needs the chat template, which --raw leaves out: give only one of them")
    placement = DeviceOptions(
        device=device,
        dtype=dtype,
        tensor_parallel_size=tensor_parallel_size,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=enforce_eager,
        device_map=device_map,
    )
    resolve_device(placement)
    named = find_named(model)
    prompt = given_prompt(prompt)
    if system is not None:
        named = replace(named, system=as_text(system))
    if adapter is not None:
        named = replace(named, adapter=adapter)
    if prompt is None and raw:
        raise ConfigError("a chat needs the chat template, which --raw leaves out: give a prompt with --raw")
    params = sampling(named.parameters, given)
    mode = speculation(named.parameters, speculate)
    parse_mode(mode)
    kv_type = parse_kv_type(kv_cache_type)
    kept = prefix_cache(prefix_cache_file, prefix_cache_size)

    def load(one: Named) -> LoadedModel:
        count = threads or one.number("num_thread")
        loaded = load_model(
            one.path,
            threads=count,
            context=ctx or one.number("num_ctx"),
            kv_cache_type=kv_type,
            adapter=one.adapter,
            placement=placement,
        )
        with draft_weights(speculation(one.parameters, speculate), one.path, threads=count) as draft:
            if draft is not None:
                loaded.draft = load_draft(draft, loaded, threads=count)
        return loaded

    for sentence in not_followed(named.parameters):
        note(sentence)
    import_early(markdown and not raw)
    loaded = load(named)
    if prompt is None:
        session = Session(named, loaded, load=load, given=given, threads=threads, speculate=speculate, kept=kept)
        session.verbose, session.markdown = verbose, markdown
        chat(session)
        return
    token_ids = raw_prompt(loaded, prompt) if raw else chat_prompt(loaded, _messages(named, prompt), named.template)
    # Only as much cache as this one answer can use.
    longest = loaded.context if params.max_tokens is None else len(token_ids) + params.max_tokens
    generator = loaded.generator(
        num_blocks=blocks_for(min(longest, loaded.context)),
        speculate=mode,
        kept_in=open_prefix_cache(loaded, kept.file, kept.size),
    )
    answer = show_answer(
        generator.generate([token_ids], params),
        num_prompt_tokens=len(token_ids),
        writer=writer_for_terminal(markdown and not raw),
    )
    note_ending(answer, params, loaded.context)
    if verbose:
        note(Figures(loaded, threads).line(answer))


def _messages(named: Named, prompt: str) -> list[Message]:
    opening = [] if named.system is None else [("system", named.system)]
    turns = [*opening, *named.messages, ("user", prompt)]
    return [{"role": role, "content": content} for role, content in turns]
