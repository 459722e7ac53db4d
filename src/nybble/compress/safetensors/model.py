"""A model as a Hugging Face folder has it, whichever container it comes from: names, order of rows, config.json.

GGUF's llama files turn neighbouring dimensions where folders turn halves of a head; here q and k always have the rows
of a folder. Values are decoded: what was quantised before is not undone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nybble.checkpoint import Checkpoint, Tensor, open_checkpoint
from nybble.compress.safetensors.config_json import config_of
from nybble.core.errors import CheckpointError
from nybble.core.spec import ModelSpec
from nybble.families.common import HF_NAMES, Source
from nybble.families.registry import map_hf
from nybble.formats.stored import Stored, floats_as

Floats = npt.NDArray[np.float32]

# Linears that read the same input, in the order in which they run (the torch decoder cuts its layers there).
GROUPS = (("attn.q", "attn.k", "attn.v"), ("attn.o",), ("ffn.gate", "ffn.up"), ("ffn.down",))
_SHORT = ("F16", "BF16")
_F16_MAX = 65504.0
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class Module:
    """A linear as the folder stores it. parts: its canonical names inside the layer, whose rows follow each other.

    group: index in GROUPS. rows: of each part.
    """

    stem: str
    layer: int
    parts: tuple[str, ...]
    rows: tuple[int, ...]
    inputs: int
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.rows), self.inputs

    @property
    def num_weights(self) -> int:
        return sum(self.rows) * self.inputs


@dataclass(frozen=True, slots=True)
class _Halves(Tensor):
    """Rows of q or k that a GGUF llama file has interleaved, given back as halves of each head."""

    heads: int = 1

    def to_float32(self) -> Floats:
        values = Tensor.to_float32(self)
        pairs = values.reshape(self.heads, -1, 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


@dataclass(frozen=True)
class FolderModel:
    """checkpoint: with rows in the folder's order. dtype: what unquantised tensors become that are not in 16 bits yet.

    uniform: those that are become it too.
    """

    checkpoint: Checkpoint
    config: Mapping[str, object]
    sources: Mapping[str, Source]
    dtype: str
    notes: tuple[str, ...] = ()
    uniform: bool = False

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @property
    def torch_dtype(self) -> str:
        """The name that config.json has for dtype."""
        return _DTYPES[self.dtype]

    @property
    def num_layers(self) -> int:
        return len(self.spec.layers)

    @property
    def num_weights(self) -> int:
        return sum(int(np.prod(tensor.shape)) for tensor in self.checkpoint.tensors.values())

    def modules(self, layer: int) -> list[Module]:
        """The linears of a layer, in the order in which they run."""
        found: dict[str, list[tuple[str, int]]] = {}
        for group, names in enumerate(GROUPS):
            for name in names:
                stored = self.sources[f"layers.{layer}.{name}"].name
                found.setdefault(stored, []).append((name, group))
        modules = []
        for stored, parts in found.items():
            shapes = [self.checkpoint.tensors[f"layers.{layer}.{name}"].shape for name, _ in parts]
            modules.append(
                Module(
                    stored.removesuffix(".weight"),
                    layer,
                    tuple(name for name, _ in parts),
                    tuple(shape[0] for shape in shapes),
                    shapes[0][1],
                    parts[0][1],
                )
            )
        return modules

    def all_modules(self) -> Iterator[Module]:
        for layer in range(self.num_layers):
            yield from self.modules(layer)

    def read(self, name: str) -> Floats:
        """A tensor's values by its canonical name. Raises CheckpointError if one is NaN or infinite."""
        tensor = self.checkpoint.tensors[name]
        values = tensor.to_float32()
        self.checkpoint.release(tensor)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.checkpoint.path}: the tensor {name!r} holds a NaN or an infinity: get the file again"
            )
        return values

    def read_module(self, module: Module) -> Floats:
        """All rows of a linear, [out, in]."""
        parts = [self.read(f"layers.{module.layer}.{name}") for name in module.parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def plain_module(self, module: Module) -> dict[str, Stored]:
        """A linear that is not quantised, as the folder stores it."""
        parts = [self.plain(f"layers.{module.layer}.{name}") for name in module.parts]
        whole = Stored(parts[0].dtype, np.concatenate([part.array for part in parts]))
        return {f"{module.stem}.weight": whole}

    def empty_module(self, module: Module) -> dict[str, Stored]:
        """As large as `plain_module`."""
        dtype = self.dtype_of(f"layers.{module.layer}.{module.parts[0]}")
        return {f"{module.stem}.weight": floats_as(np.zeros(module.shape, np.float32), dtype)}

    def stored_name(self, name: str) -> str:
        return self.sources[name].name

    def plain(self, name: str, values: Floats | None = None) -> Stored:
        """An unquantised tensor as the folder stores it. values: what it has become, if it has changed.

        Raises CheckpointError if a value is NaN or infinite, or leaves the range of what it is stored in.
        """
        dtype, as_it_lies = self.dtype_of(name), self.checkpoint.tensors[name]
        if values is None and as_it_lies.plus_one:
            stored = replace(as_it_lies, plus_one=False).to_float32()  # without the rounding of adding one
            if np.isfinite(stored).all():
                return floats_as(stored, dtype)
        values = self.read(name) if values is None else values
        if self.sources[name].plus_one:
            values = values - 1
        if dtype == "F16" and values.size and max(float(values.max()), -float(values.min())) > _F16_MAX:
            raise CheckpointError(
                f"{self.checkpoint.path}: the tensor {name!r} has values beyond {_F16_MAX:.0f}, which float16 cannot "
                "hold: convert the model to bf16 first"
            )
        return floats_as(values, dtype)

    def dtype_of(self, name: str) -> str:
        """What an unquantised tensor is kept in.

        What has 16 bits stays as it is; all else gets the one type of config.json, vectors too: transformers loads
        quantised folders in the types of their tensors, and cannot multiply two different ones.
        """
        tensor = self.checkpoint.tensors[name]
        if self.checkpoint.container == "safetensors" and tensor.format.name in _SHORT:
            return self.dtype if self.uniform else tensor.format.name
        return self.dtype

    def in_dtype(self, dtype: str) -> FolderModel:
        """The same, with every matrix in F16 or BF16."""
        return replace(self, dtype=dtype, config=_with_dtype(self.config, dtype), uniform=True)

    def layer_vectors(self, layer: int) -> list[str]:
        """Canonical names of a layer's norms and biases."""
        prefix = f"layers.{layer}."
        tensors = self.checkpoint.tensors
        return [name for name in tensors if name.startswith(prefix) and len(tensors[name].shape) == 1]

    def outer(self) -> list[str]:
        """Canonical names of what is in no layer."""
        return [name for name in self.checkpoint.tensors if not name.startswith("layers.")]


def open_folder_model(path: Path) -> FolderModel:
    """A GGUF file or a Hugging Face folder.

    Raises:
        ModelNotFoundError: there is nothing at `path`.
        CheckpointError: what is there is damaged, or cannot be said in a config.json.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.container == "safetensors":
        return _from_folder(checkpoint)
    return _from_gguf(checkpoint)


def _from_folder(checkpoint: Checkpoint) -> FolderModel:
    config = {key: value for key, value in checkpoint.metadata.items() if key not in _QUANTISATION}
    notes = []
    if any(tensor.packed is not None for tensor in checkpoint.tensors.values()):
        notes.append("the model is already quantised: what that cost is not undone")
    if checkpoint.spec.tied_head:
        config["tie_word_embeddings"] = True
    wanted = str(config.get("dtype", config.get("torch_dtype", "")))
    dtype = {"float16": "F16", "bfloat16": "BF16"}.get(wanted, _default_dtype(checkpoint.spec))
    return FolderModel(checkpoint, _with_dtype(config, dtype), checkpoint.sources, dtype, tuple(notes))


_QUANTISATION = ("quantization_config", "compression_config")


def _from_gguf(checkpoint: Checkpoint) -> FolderModel:
    dtype = _default_dtype(checkpoint.spec)
    config = config_of(checkpoint)
    spec = replace(
        checkpoint.spec,
        layers=tuple(replace(layer, rope=replace(layer.rope, interleaved=False)) for layer in checkpoint.spec.layers),
    )
    where = f"{checkpoint.path}, as config.json would say it"
    mapped = map_hf(config, frozenset(_names(spec)), where)
    differing = difference(spec, mapped.spec)
    if differing:
        raise CheckpointError(
            f"{checkpoint.path}: its {differing} cannot be said in a config.json: use the model's own folder instead"
        )
    tensors = {name: _reordered(checkpoint.spec, name, tensor) for name, tensor in checkpoint.tensors.items()}
    coarse = dict.fromkeys(t.format.name for t in tensors.values() if t.format.name not in ("F32", "F16", "BF16"))
    notes = []
    if coarse:
        notes.append(f"the model is already quantised ({', '.join(coarse)}): what that cost is not undone")
    inner = replace(checkpoint, spec=mapped.spec, tensors=tensors)
    return FolderModel(inner, _with_dtype(config, dtype), mapped.sources, dtype, tuple(notes))


def _names(spec: ModelSpec) -> Iterator[str]:
    """Names by which families tell what a folder has: biases, norms of q and k, a head of its own."""
    if not spec.tied_head:
        yield HF_NAMES["head"]
    first = spec.layers[0]
    if first.qkv_bias:
        yield HF_NAMES["attn.q.bias"].format(i=0)
    if first.out_bias:
        yield HF_NAMES["attn.o.bias"].format(i=0)
    if first.qk_norm:
        yield HF_NAMES["attn.q_norm"].format(i=0)


def difference(a: ModelSpec, b: ModelSpec) -> str | None:
    """What two descriptions disagree in, as far as they compute differently."""
    for name in ("vocab_size", "hidden_size", "norm_eps", "tied_head", "embed_scale", "logit_scale", "logit_softcap"):
        one_value, other_value = getattr(a, name), getattr(b, name)
        same = one_value == other_value if one_value is None else other_value is not None
        if not same or (one_value is not None and not math.isclose(one_value, other_value, rel_tol=1e-6)):
            return name.replace("_", " ")
    for one, other in zip(a.layers, b.layers, strict=True):
        scale_differs = not math.isclose(one.sm_scale, other.sm_scale, rel_tol=1e-6)
        if scale_differs or replace(one, rope=other.rope, sm_scale=other.sm_scale) != other:
            return "layers"
        if (one.rope.base, one.rope.rotary_dim) != (other.rope.base, other.rope.rotary_dim):
            return "rotary embedding"
    return None


def _reordered(spec: ModelSpec, name: str, tensor: Tensor) -> Tensor:
    if not name.startswith("layers."):
        return tensor
    _, index, inner = name.split(".", 2)
    layer = spec.layers[int(index)]
    counts = {"attn.q": layer.num_q_heads, "attn.k": layer.num_kv_heads}
    heads = counts.get(inner.removesuffix(".bias"))
    if heads is None or not layer.rope.interleaved:
        return tensor
    if layer.rope.rotary_dim != layer.head_dim:
        raise CheckpointError(f"{name} turns a part of each head only, which a folder of this family cannot say")
    return _Halves(
        tensor.name,
        tensor.shape,
        tensor.format,
        tensor.data,
        tensor.plus_one,
        tensor.file,
        tensor.begin,
        tensor.packed,
        heads,
    )


def _default_dtype(spec: ModelSpec) -> str:
    """Gemma's activations leave the range of float16, so its users run it in bfloat16."""
    return "BF16" if spec.family.startswith("gemma") else "F16"


def _with_dtype(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    rest = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    # The first for transformers 5, the second for those before it.
    return {**rest, "dtype": _DTYPES[dtype], "torch_dtype": _DTYPES[dtype]}
