"""`nybble show`: what is in a model file."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nybble.checkpoint import Checkpoint, open_checkpoint
from nybble.cli.named import parameter_lines, stored_model
from nybble.cli.options import local_path
from nybble.core.errors import ConfigError
from nybble.core.spec import LayerSpec, ModelSpec
from nybble.core.tokenizer_source import TokenizerFile
from nybble.store import StoredModel
from nybble.store.modelfile import Command, format_modelfile
from nybble.tokenizer import load_tokenizer


@dataclass(slots=True)
class _Share:
    """The tensors of one encoding."""

    num_tensors: int = 0
    num_weights: int = 0
    num_bytes: int = 0

    @property
    def bpw(self) -> float:
        return 8 * self.num_bytes / self.num_weights if self.num_weights else 0.0


def show(
    file: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF file, a Hugging Face folder, or a name.")],
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Only a Modelfile that makes this model.")] = False,
    template: Annotated[bool, typer.Option("--template", help="Only the chat template.")] = False,
    system: Annotated[bool, typer.Option("--system", help="Only the system message.")] = False,
    parameters: Annotated[bool, typer.Option("--parameters", help="Only the parameters.")] = False,
    license: Annotated[bool, typer.Option("--license", help="Only the licence.")] = False,
) -> None:
    """Show architecture, encodings, tokenizer and chat template of a model, and what its Modelfile says."""
    if modelfile + template + system + parameters + license > 1:
        raise ConfigError("--modelfile, --template, --system, --parameters and --license each show one thing: give one")
    path = local_path(file)
    stored = stored_model(file)
    if modelfile:
        sys.stdout.write(format_modelfile([Command("FROM", str(path))]) if stored is None else stored.modelfile())
    elif system or parameters or license:
        texts = _stored_texts(stored)
        print(texts["system"] if system else texts["parameters"] if parameters else texts["license"])
    elif template:
        print((stored.template if stored is not None else None) or open_checkpoint(path).chat_template or "")
    else:
        _show_all(path, stored)


def _stored_texts(stored: StoredModel | None) -> dict[str, str]:
    if stored is None:
        return {"system": "", "parameters": "", "license": ""}
    return {
        "system": stored.system or "",
        "parameters": parameter_lines(stored.parameters),
        "license": "\n\n".join(stored.license),
    }


def _show_all(path: Path, stored: StoredModel | None) -> None:
    checkpoint = open_checkpoint(path)
    console = Console()
    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold")
    facts.add_column()
    for name, value in (*_stored_facts(stored), *_facts(checkpoint)):
        facts.add_row(name, escape(value))
    console.print(facts)
    console.print(_encodings(checkpoint))


def _stored_facts(stored: StoredModel | None) -> Iterator[tuple[str, str]]:
    if stored is None:
        return
    yield "name", f"{stored.name}, {stored.digest[:19]}"
    if stored.parent is not None:
        yield "made from", stored.parent
    for name, text in _stored_texts(stored).items():
        if text:
            yield name, text if name == "parameters" else text.strip().splitlines()[0][:100]
    if stored.messages:
        yield "messages", str(len(stored.messages))
    if stored.template is not None:
        yield "its template", f"{len(stored.template)} characters"


def _facts(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    spec = checkpoint.spec
    yield "file", f"{checkpoint.path} ({checkpoint.container}, {checkpoint.file_bytes / 1e6:.1f} MB)"
    yield "architecture", f"{spec.family}, {len(spec.layers)} layers, hidden size {spec.hidden_size}"
    for span, layer in _layer_kinds(spec):
        yield f"layers {span}", _describe(layer)
    yield "context", f"{spec.context_length} tokens"
    yield "output head", "shares the embedding" if spec.tied_head else "its own weights"
    kv_bytes = sum(2 * 2 * layer.num_kv_heads * layer.head_dim for layer in spec.layers)
    yield "KV cache", f"{kv_bytes / 1024:.1f} KiB per token (float16)"
    yield from _tokenizer_facts(checkpoint)


def _tokenizer_facts(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    source = checkpoint.tokenizer
    tokenizer = load_tokenizer(source)
    origin = "tokenizer.json" if isinstance(source, TokenizerFile) else "from GGUF metadata"
    kind = "" if isinstance(source, TokenizerFile) else f"{source.metadata.get('tokenizer.ggml.model')}, "
    yield "tokenizer", f"{kind}{tokenizer.vocab_size} tokens, {origin}"
    ends = sorted(set(checkpoint.eos_token_ids) | set(tokenizer.eos_token_ids))
    yield "ends with", ", ".join(f"{token_id} {tokenizer.token_bytes(token_id)!r}" for token_id in ends) or "nothing"
    begins = f"token {checkpoint.bos_token_id}" if checkpoint.add_bos else "nothing added"
    yield "begins with", begins
    template = checkpoint.chat_template
    yield "chat template", "none: use `nybble run --raw`" if template is None else f"{len(template)} characters"


def _layer_kinds(spec: ModelSpec) -> Iterator[tuple[str, LayerSpec]]:
    """Each kind of layer once, with the numbers of the layers that are of it."""
    kinds: dict[LayerSpec, list[int]] = defaultdict(list)
    for number, layer in enumerate(spec.layers):
        kinds[layer].append(number)
    for layer, numbers in kinds.items():
        yield _ranges(numbers), layer


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _describe(layer: LayerSpec) -> str:
    parts = [f"{layer.num_q_heads} query and {layer.num_kv_heads} kv heads of {layer.head_dim}"]
    parts.append(f"feed-forward {layer.ffn_size} {layer.activation}")
    parts.append(f"rope base {layer.rope.base:g}")
    if layer.rope.scaling.kind != "none":
        parts.append(f"rope scaling {layer.rope.scaling.kind}")
    if layer.window is not None:
        parts.append(f"window {layer.window}")
    if layer.qk_norm:
        parts.append("q and k norms")
    if layer.qkv_bias:
        parts.append("q, k and v biases")
    return ", ".join(parts)


def _encodings(checkpoint: Checkpoint) -> Table:
    shares: dict[str, _Share] = defaultdict(_Share)
    for tensor in checkpoint.tensors.values():
        for share in (shares[tensor.format.name], shares["all"]):
            share.num_tensors += 1
            share.num_weights += prod(tensor.shape)
            share.num_bytes += tensor.data.nbytes
    total = shares.pop("all", _Share())
    table = Table("encoding")
    for name in ("tensors", "weights", "MB", "bits per weight"):
        table.add_column(name, justify="right")
    rows = [*sorted(shares.items(), key=lambda item: -item[1].num_bytes), ("all", total)]
    for name, share in rows:
        numbers = (f"{share.num_tensors}", f"{share.num_weights:,}", f"{share.num_bytes / 1e6:.1f}", f"{share.bpw:.2f}")
        table.add_row(name, *numbers, end_section=name == rows[-2][0])
    return table
