"""The pruned model: its spec, and how it is said in a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from nybble.checkpoint import Checkpoint, Tensor, open_checkpoint
from nybble.compress.gguf.source import Source, source_of
from nybble.compress.gguf.write import make_plan, write
from nybble.compress.methods import Progress
from nybble.compress.prune.layers import DoneLayer
from nybble.compress.safetensors.model import FolderModel, difference
from nybble.compress.safetensors.side_files import write_side_files
from nybble.core.errors import CheckpointError, ConfigError
from nybble.core.spec import ModelSpec
from nybble.families.common import HF_NAMES, layer_shapes
from nybble.families.registry import map_hf
from nybble.formats.gguf import GgufFile
from nybble.formats.output_folder import OutputFolder
from nybble.formats.safetensors import SafeTensor
from nybble.formats.safetensors_writer import Entry, write_json, write_shards

_FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
_PER_LAYER = {"num_q_heads": "heads", "num_kv_heads": "kv heads", "ffn_size": "feed-forward neurons"}


@dataclass(frozen=True)
class Pruned:
    """model: the one that was pruned. layers: what is left of it, in order. outer: tensors of no layer, by name."""

    model: FolderModel
    layers: Sequence[DoneLayer]
    outer: Mapping[str, SafeTensor]

    @property
    def spec(self) -> ModelSpec:
        return replace(self.model.spec, layers=tuple(layer.spec for layer in self.layers))

    def num_weights(self) -> int:
        return num_weights(self.spec)


def num_weights(spec: ModelSpec) -> int:
    """Of all tensors of a model."""
    count = spec.vocab_size * spec.hidden_size * (1 if spec.tied_head else 2) + spec.hidden_size
    return count + sum(prod(shape) for one in spec.layers for shape in layer_shapes(one, spec.hidden_size).values())


def differing(spec: ModelSpec) -> str | None:
    """What the layers of a model differ in, in words."""
    found = [words for name, words in _PER_LAYER.items() if len({getattr(layer, name) for layer in spec.layers}) > 1]
    return " and ".join(found) or None


def folder_config(model: FolderModel, spec: ModelSpec, sources: Sequence[int]) -> dict[str, object]:
    """config.json of the pruned model. sources: which layers of the model it has.

    Raises ConfigError for what a folder of this family cannot say.
    """
    different = differing(spec)
    if different:
        raise ConfigError(
            f"the layers differ in {different}, and a config.json has one number for all of them: write a GGUF file (a "
            "name that ends in .gguf), or use scope layer"
        )
    first = spec.layers[0]
    strict = str(model.config.get("architectures")).startswith(("['Llama", "['Gemma"))
    if strict and spec.hidden_size % first.num_q_heads and first != model.spec.layers[0]:
        raise ConfigError(
            f"{first.num_q_heads} heads do not divide the {spec.hidden_size} of hidden_size, which transformers wants "
            "of this family: keep another number of heads, or write a GGUF file (a name that ends in .gguf)"
        )
    config = {
        **model.config,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": first.num_q_heads,
        "num_key_value_heads": first.num_kv_heads,
        "head_dim": first.head_dim,
        "intermediate_size": first.ffn_size,
    }
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == model.num_layers:
        config["layer_types"] = [kinds[i] for i in sources]
    if first.out_bias and not model.spec.layers[0].out_bias:
        config["attention_bias"] = True
    try:
        said = map_hf(config, frozenset(stored_names(model, spec)), "config.json").spec
        wrong = difference(spec, said)
    except CheckpointError as e:
        raise ConfigError(f"a folder of the family {spec.family} cannot say the pruned model: {e}") from e
    if wrong:
        raise ConfigError(
            f"a folder of the family {spec.family} cannot say the {wrong} of the pruned model: write a GGUF file (a "
            "name that ends in .gguf) instead"
        )
    return config


def stored_names(model: FolderModel, spec: ModelSpec) -> dict[str, list[str]]:
    """Name in a folder -> canonical names of the tensors whose rows it holds, in order."""
    found: dict[str, list[str]] = {}
    for name in model.outer():
        found.setdefault(model.stored_name(name), []).append(name)
    for index, layer in enumerate(spec.layers):
        for inner in layer_shapes(layer, spec.hidden_size):
            name = f"layers.{index}.{inner}"
            source = model.sources.get(name)
            stored = HF_NAMES[inner].format(i=index) if source is None else source.name
            found.setdefault(stored, []).append(name)
    return found


def write_folder(pruned: Pruned, folder: OutputFolder, drop: Sequence[Path]) -> int:
    """Join what lies in the working folder, and give it its name. Gives the bytes of its weights.

    Raises ConfigError for what a folder cannot say, OutputError if it cannot be written.
    """
    model, spec = pruned.model, pruned.spec
    config = folder_config(model, spec, [layer.source for layer in pruned.layers])
    entries = [_entry(stored, [_find(pruned, n) for n in parts]) for stored, parts in stored_names(model, spec).items()]
    write_shards(folder.work, entries)
    write_side_files(model.checkpoint, folder.work)
    write_json(folder.work / "config.json", config)
    open_checkpoint(folder.work).close()  # it can be read
    folder.commit([*drop])
    return sum(entry.num_bytes for entry in entries)


def _find(pruned: Pruned, name: str) -> SafeTensor:
    if not name.startswith("layers."):
        return pruned.outer[name]
    _, index, inner = name.split(".", 2)
    return pruned.layers[int(index)].tensors[inner]


def _entry(name: str, parts: list[SafeTensor]) -> Entry:
    first = parts[0]
    rows = sum(part.shape[0] for part in parts)
    views = [part.file.view[part.begin : part.end] for part in parts]
    size = sum(len(view) for view in views)
    return Entry(
        name,
        first.format.name,
        (rows, *first.shape[1:]),
        size,
        lambda: views[0] if len(views) == 1 else b"".join(views),
    )


def gguf_source(pruned: Pruned) -> Source:
    """What a GGUF file of the pruned model has.

    Raises CheckpointError, TokenizerError for what GGUF, or llama.cpp reading it, cannot say.
    """
    model, spec = pruned.model, pruned.spec
    tensors = {}
    for names in stored_names(model, spec).values():
        for name in names:
            lying = _find(pruned, name)
            source = model.sources.get(name)
            plus_one = source is not None and source.plus_one
            view = lying.file.view[lying.begin : lying.end]
            tensors[name] = Tensor(name, lying.shape, lying.format, view, plus_one)
    checkpoint = replace(model.checkpoint, spec=spec, tensors=tensors, sources={}, files=())
    return source_of(checkpoint, keys=_own_keys(model.checkpoint))


def _own_keys(checkpoint: Checkpoint) -> dict[str, bytes] | None:
    """All keys of a GGUF file as they lie in it, so that none is lost; None for a folder, which has none."""
    if checkpoint.container != "gguf":
        return None
    gguf = GgufFile(checkpoint.path)
    return {key: gguf.value_bytes(key) for key in gguf.metadata}


def write_gguf(source: Source, pruned: Pruned, target: Path, progress: Progress, *, force: bool) -> int:
    """Gives the bytes of the file. Raises OutputError if it cannot be written."""
    names = [tensor.info.format.name for tensor in source.tensors if len(tensor.info.shape) == 2]
    file_type = _FILE_TYPES[max(set(names), key=names.count)]
    plan = make_plan(source, [tensor.info.format for tensor in source.tensors], file_type, {}, ())

    def check(path: Path) -> None:
        written = open_checkpoint(path)
        layers = tuple(replace(one, rope=replace(one.rope, interleaved=False)) for one in written.spec.layers)
        wrong = difference(pruned.spec, replace(written.spec, layers=layers))
        written.close()
        if wrong:
            raise CheckpointError(f"{target} cannot say the {wrong} of the pruned model: write a folder instead")

    write(plan, target, progress, force=force, check=check)
    return plan.report.target_bytes
