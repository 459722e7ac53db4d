"""What a GGUF file is made of, whichever container it comes from: keys, and tensors in their file's own bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nybble.checkpoint import Checkpoint, Tensor, open_checkpoint
from nybble.compress.gguf.mixes import Facts, in_file_order
from nybble.compress.gguf.model_keys import PER_LAYER, architecture_of, extra_tensors, model_keys, width_keys
from nybble.compress.gguf.vocabulary import tokenizer_keys
from nybble.core.errors import CheckpointError, ModelNotFoundError
from nybble.core.fields import Fields
from nybble.families.common import GGUF_NAMES
from nybble.formats.gguf import GgufFile, GgufTensor
from nybble.formats.gguf_writer import TensorInfo, encode_value
from nybble.formats.mapping import MappedFile
from nybble.quant.formats import FORMATS

# Keys about the file, not the model: ours has its own type and alignment, and is in one part.
_DROPPED = frozenset(
    (
        *("general.quantization_version", "general.file_type", "general.alignment"),
        *("split.no", "split.count", "split.tensors.count"),
    )
)


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """info: as it will be without quantising. read: its bytes; release: gives back the memory that they lie in."""

    info: TensorInfo
    read: Callable[[], memoryview]
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Source:
    """keys: without those that depend on the type; tensors: in the order in which they will be written."""

    path: Path
    facts: Facts
    keys: Mapping[str, bytes]
    tensors: list[SourceTensor]
    file_bytes: int
    notes: tuple[str, ...] = ()


def open_source(path: Path) -> Source:
    """A GGUF file or a Hugging Face folder.

    Raises:
        ModelNotFoundError: there is nothing at `path`.
        CheckpointError, TokenizerError: what is there is damaged or cannot be said in a GGUF file.
    """
    if path.is_dir():
        return source_of(open_checkpoint(path))
    if not path.exists():
        raise ModelNotFoundError(f"{path} does not exist: give a GGUF file or a model folder")
    return _from_gguf(path)


def _from_gguf(path: Path) -> Source:
    gguf = GgufFile(path)
    f = Fields(gguf.metadata, str(path))
    if f.integer("split.count", 1, low=0) > 1:
        raise CheckpointError(f"{path} is one part of several: join them with llama.cpp's llama-gguf-split first")
    arch = f.text("general.architecture")
    own = Fields(gguf.metadata, str(path), prefix=f"{arch}.")
    layers = own.integer("block_count")
    heads = own.per_layer("attention.head_count", layers)
    kv_heads = own.per_layer("attention.head_count_kv", layers, heads[0])
    facts = Facts(arch, layers, heads[0], kv_heads[0], own.integer("expert_count", 0, low=0))
    keys = {key: gguf.value_bytes(key) for key in gguf.metadata if key not in _DROPPED}
    by_name = gguf.tensors
    infos = in_file_order(TensorInfo(t.name, t.shape, t.format) for t in by_name.values())
    tensors = [
        SourceTensor(info, _reader(gguf.data(by_name[info.name])), _releaser(gguf.file, *_span(by_name[info.name])))
        for info in infos
    ]
    return Source(path, facts, keys, tensors, gguf.file.size)


def _span(tensor: GgufTensor) -> tuple[int, int]:
    return tensor.begin, tensor.end


def _reader(view: memoryview) -> Callable[[], memoryview]:
    return lambda: view


def _releaser(file: MappedFile | None, begin: int, end: int) -> Callable[[], None]:
    return lambda: None if file is None else file.release(begin, end)


def source_of(checkpoint: Checkpoint, keys: Mapping[str, bytes] | None = None) -> Source:
    """An open folder: names, the order of rotary dimensions and Gemma's norms change, no other value does.

    keys: of the GGUF file that the model comes from, if it does; then only those that say widths are made anew.

    Raises CheckpointError, TokenizerError for what GGUF cannot say.
    """
    spec = checkpoint.spec
    arch = architecture_of(spec, str(checkpoint.path))
    made, notes = model_keys(checkpoint)
    if keys is None:
        keys = {key: encode_value(value) for key, value in {**made, **tokenizer_keys(checkpoint)}.items()}
    else:
        keys = _with_widths(keys, checkpoint, arch)
    tensors: dict[str, SourceTensor] = {}
    fused = spec.family == "phi3"
    for canonical, tensor in checkpoint.tensors.items():
        layer, inner = "", canonical
        if canonical.startswith("layers."):
            _, layer, inner = canonical.split(".", 2)
        if fused and inner in ("attn.k", "attn.v", "ffn.up"):
            continue  # lie behind q and gate in the same tensor
        name = GGUF_NAMES[inner].format(i=layer)
        if fused and inner == "attn.q":
            name = f"blk.{layer}.attn_qkv.weight"
            tensor = _joined(checkpoint, f"layers.{layer}.attn.", ("q", "k", "v"))
        if fused and inner == "ffn.gate":
            name = f"blk.{layer}.ffn_up.weight"
            tensor = _joined(checkpoint, f"layers.{layer}.ffn.", ("gate", "up"))
        heads = 0
        if arch in ("llama", PER_LAYER) and layer and not spec.layers[int(layer)].rope.interleaved:
            heads = {
                "attn.q": spec.layers[int(layer)].num_q_heads,
                "attn.k": spec.layers[int(layer)].num_kv_heads,
            }.get(inner.removesuffix(".bias"), 0)
        tensors[name] = _converted(name, tensor, heads)
    for name, values in extra_tensors(spec).items():
        info = TensorInfo(name, (len(values),), FORMATS["F32"])
        data = np.array(values, np.float32).data.cast("B")
        tensors[name] = SourceTensor(info, _reader(data), _releaser(None, 0, 0))
    first = spec.layers[0]
    facts = Facts(arch, len(spec.layers), first.num_q_heads, first.num_kv_heads)
    order = in_file_order(tensor.info for tensor in tensors.values())
    return Source(
        checkpoint.path,
        facts,
        keys,
        [tensors[info.name] for info in order],
        checkpoint.file_bytes,
        tuple(notes),
    )


def _with_widths(keys: Mapping[str, bytes], checkpoint: Checkpoint, arch: str) -> dict[str, bytes]:
    before = f"{checkpoint.metadata['general.architecture']}."
    renamed = {
        f"{arch}.{key.removeprefix(before)}" if key.startswith(before) else key: value
        for key, value in keys.items()
        if key not in _DROPPED
    }
    widths = {f"{arch}.{key}": encode_value(value) for key, value in width_keys(checkpoint.spec).items()}
    return {**renamed, **widths, "general.architecture": encode_value(arch)}


def _converted(name: str, tensor: Tensor, heads: int) -> SourceTensor:
    """Vectors become float32; with `heads`, the two halves of each head's dimensions are interleaved."""
    is_vector = len(tensor.shape) == 1
    info = TensorInfo(name, tensor.shape, FORMATS["F32"] if is_vector else tensor.format)

    def read() -> memoryview:
        data = tensor.to_float32().reshape(-1).data.cast("B") if is_vector else tensor.data
        if heads:
            rows = np.frombuffer(data, np.uint8).reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
            data = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1).data
        return data

    return SourceTensor(info, read, _releaser(tensor.file, tensor.begin, tensor.begin + len(tensor.data)))


def _joined(checkpoint: Checkpoint, prefix: str, parts: tuple[str, ...]) -> Tensor:
    """Slices of rows that follow each other in one stored tensor, as that tensor."""
    slices = [checkpoint.tensors[prefix + part] for part in parts]
    first, last = slices[0], slices[-1]
    rows = sum(part.shape[0] for part in slices)
    if first.file is None:  # in memory, each by itself
        whole = memoryview(b"".join(part.data for part in slices))
        return Tensor(first.name, (rows, first.shape[1]), first.format, whole)
    data = first.file.view[first.begin : last.begin + len(last.data)]
    return Tensor(first.name, (rows, first.shape[1]), first.format, data, file=first.file, begin=first.begin)
