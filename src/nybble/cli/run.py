"""`nybble run`: one answer, or a chat."""

from __future__ import annotations

from typing import Annotated

import typer

from nybble.cli.answer import Figures, note, note_ending, show_answer
from nybble.cli.chat import chat
from nybble.cli.options import ModelArgument, SpeculateOption, ThreadsOption, local_path
from nybble.cli.prompt import as_text, chat_prompt, given_prompt, raw_prompt
from nybble.core.errors import ConfigError
from nybble.core.sampling import SamplingParams
from nybble.engine.load import load_model
from nybble.engine.scheduler import blocks_for
from nybble.engine.speculate import parse_mode


def run(
    model: ModelArgument,
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask. Without it: standard input if that is piped, an interactive chat if not."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that make up this probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0: from all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens below this fraction of the likeliest one.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes the answer repeatable; by default every one differs.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message that a chat begins with.")] = None,
    threads: ThreadsOption = None,
    ctx: Annotated[
        int | None, typer.Option(help="Tokens of context; by default 8192, or the model's own limit if that is less.")
    ] = None,
    speculate: SpeculateOption = "auto",
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print a line of figures after each answer (to standard error).")
    ] = False,
) -> None:
    """Ask a model, or chat with it."""
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed, max_tokens=max_tokens
    )
    if raw and system is not None:
        raise ConfigError("--system needs the chat template, which --raw leaves out: give only one of them")
    path = local_path(model)
    prompt = given_prompt(prompt)
    system = None if system is None else as_text(system)
    if prompt is None and raw:
        raise ConfigError("a chat needs the chat template, which --raw leaves out: give a prompt with --raw")
    mode = parse_mode(speculate)
    loaded = load_model(path, threads=threads, context=ctx)
    if prompt is None:
        chat(loaded, params, system=system, threads=threads, speculate=mode, verbose=verbose)
        return
    if raw:
        token_ids = raw_prompt(loaded, prompt)
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        token_ids = chat_prompt(loaded, [*messages, {"role": "user", "content": prompt}])
    # Only as much cache as this one answer can use.
    generator = loaded.generator(
        num_blocks=blocks_for(min(len(token_ids) + max_tokens, loaded.context)), speculate=mode
    )
    answer = show_answer(generator.generate([token_ids], params), num_prompt_tokens=len(token_ids))
    note_ending(answer, params, loaded.context)
    if verbose:
        note(Figures(loaded, threads).line(answer))
