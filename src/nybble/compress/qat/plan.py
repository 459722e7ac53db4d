"""Which tensor of a model gets which grid, and how the trained model becomes a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from nybble.backends.torch.trainable import TrainableDecoder
from nybble.checkpoint import Checkpoint
from nybble.compress.distil.run import file_name
from nybble.compress.gguf.imatrix import ImportanceMatrix
from nybble.compress.gguf.mixes import Mix, assign, parse_overrides
from nybble.compress.grids import Grid
from nybble.compress.methods import Progress
from nybble.compress.qat.blocks import BlockGrid, encode
from nybble.compress.qat.integers import IntegerGrid, StoredFloats
from nybble.compress.qat.options import INTEGERS, QatOptions
from nybble.compress.qat.pack import LAYOUTS
from nybble.compress.rtn.config import compressed_config
from nybble.compress.safetensors.linear import TORCH_DTYPES
from nybble.compress.safetensors.model import FolderModel, Module
from nybble.compress.safetensors.options import fitting_group
from nybble.compress.train.group import Group
from nybble.compress.train.model import (
    Bytes,
    Floats,
    TrainModel,
    float_bytes,
    gguf_source,
    write_trained_folder,
    write_trained_gguf,
)
from nybble.core.errors import ConfigError
from nybble.formats.dialects.compressed import write_packed
from nybble.formats.stored import Stored
from nybble.quant.formats import QuantFormat
from nybble.quant.reference import dequantize
from nybble.quant.weights import GroupedInt

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down")


@dataclass
class Prepared:
    """weights: the latent ones by canonical name. frozen: those that are not trained. transforms: grids."""

    weights: dict[str, torch.Tensor]
    frozen: set[str] = field(default_factory=set)
    transforms: dict[str, nn.Module] = field(default_factory=dict)


class GridPlan(ABC):
    """notes: sentences worth reading. Grids are made by `prepare` and read again by `write`."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @abstractmethod
    def prepare(self, imatrix: ImportanceMatrix | None) -> Prepared:
        """Everything that a trainable decoder needs."""

    @abstractmethod
    def write(self, model: TrainableDecoder, target: Path, progress: Progress, group: Group, *, force: bool) -> int:
        """Bytes of the weights. Every process must come; the first writes. Raises OutputError."""


def _importance(imatrix: ImportanceMatrix | None, checkpoint: Checkpoint, name: str, width: int) -> Floats | None:
    if imatrix is None:
        return None
    found = imatrix.weights(file_name(checkpoint, name), width)
    if found is None:
        raise ConfigError(f"the importance matrix has nothing for {name}: it was made for another model")
    return found


class IntegerPlan(GridPlan):
    """Integers of a compressed-tensors folder; embeddings and head stay as the folder has them."""

    def __init__(self, model: TrainModel, options: QatOptions) -> None:
        super().__init__()
        assert model.folder is not None
        self._model = model
        self._folder: FolderModel = model.folder
        self._name = options.to.lower()
        bits, size = INTEGERS[self._name]
        widths = sorted({module.inputs for module in self._folder.all_modules()})
        size, note = fitting_group(size if options.group_size is None else options.group_size, widths)
        self.notes += [] if note is None else [note]
        self.grid = Grid(bits, size, options.symmetric, search=bits < 8, scale_dtype=TORCH_DTYPES[self._folder.dtype])

    def prepare(self, imatrix: ImportanceMatrix | None) -> Prepared:
        """As GridPlan."""
        prepared = Prepared(self._model.weights())
        if imatrix is None:  # a blind search is a worse start than none: docs/quantise-safetensors.md
            self.grid = replace(self.grid, search=False)
        for name, weight in prepared.weights.items():
            tensor = self._model.checkpoint.tensors[name]
            dtype = TORCH_DTYPES[self._folder.dtype_of(name)]
            plus_one = self._folder.sources[name].plus_one
            if name.startswith("layers.") and weight.dim() == 2:
                found = _importance(imatrix, self._model.checkpoint, name, tensor.shape[1])
                weights = None if found is None else torch.from_numpy(found)
                prepared.transforms[name] = IntegerGrid(weight, self.grid, weights)
            elif weight.dim() == 2:
                prepared.weights[name] = weight.to(dtype).float()
                prepared.frozen.add(name)
            else:
                prepared.transforms[name] = StoredFloats(dtype, plus_one=plus_one)
        return prepared

    def write(self, model: TrainableDecoder, target: Path, progress: Progress, group: Group, *, force: bool) -> int:
        """As GridPlan."""
        packed: dict[str, GroupedInt] = {}
        vectors: dict[str, Floats] = {}
        for name, weight, transform in walked(model, group):
            if isinstance(transform, IntegerGrid):
                packed[name] = transform.export(weight)
            elif weight.dim() == 1:
                vectors[name] = np.array(weight.cpu().numpy())
        if not group.leads:
            return 0
        modules = list(self._folder.all_modules())

        def linear(module: Module) -> Mapping[str, Stored]:
            parts = [packed[f"layers.{module.layer}.{part}"] for part in module.parts]
            return write_packed(module.stem, _joined(parts), dtype=self._folder.dtype)

        config = compressed_config({module.stem: self._name for module in modules}, {self._name: self.grid})
        return write_trained_folder(self._folder, target, vectors=vectors, linear=linear, config=config, force=force)


def _joined(parts: list[GroupedInt]) -> GroupedInt:
    first = parts[0]
    zeros = None if first.zeros is None else np.concatenate([np.asarray(part.zeros) for part in parts])
    codes = np.concatenate([part.codes for part in parts])
    return GroupedInt(first.bits, first.group_size, codes, np.concatenate([p.scales for p in parts]), zeros)


class BlockPlan(GridPlan):
    """Blocks of a GGUF file, each tensor with the type that the mix gives it.

    Embeddings and a head of their own are encoded once and stay.
    """

    def __init__(self, model: TrainModel, options: QatOptions, mix: Mix) -> None:
        super().__init__()
        self._model = model
        self._mix = mix
        self._threads = options.threads
        checkpoint = model.checkpoint
        source = gguf_source(checkpoint)
        infos = [tensor.info for tensor in source.tensors]
        overrides = parse_overrides([_override(one) for one in options.tensor])
        assigned = assign(mix, source.facts, infos, has_imatrix=True, overrides=overrides)
        by_file = {one.info.name: one.format for one in assigned}
        self.formats: dict[str, QuantFormat] = {
            name: by_file[file_name(checkpoint, name)] for name in checkpoint.tensors
        }
        fallen = sorted({(one.wanted, one.format.name, one.info.shape[-1]) for one in assigned if one.wanted})
        self.notes += [
            f"matrices of width {width} are trained as {name} instead of {wanted}, whose blocks do not divide it"
            for wanted, name, width in fallen
        ]
        self._fixed: dict[str, Bytes] = {}

    def prepare(self, imatrix: ImportanceMatrix | None) -> Prepared:
        """As GridPlan."""
        prepared = Prepared(self._model.weights())
        for name, weight in prepared.weights.items():
            if weight.dim() != 2:
                continue
            fmt = self.formats[name]
            if fmt.name not in LAYOUTS:
                self._fix(prepared, name, float_bytes(weight.numpy(), fmt))
                continue
            inner = name.startswith("layers.")
            found = _importance(imatrix, self._model.checkpoint, name, weight.shape[1]) if inner else None
            data = encode(weight.numpy(), fmt, found, threads=self._threads, name=name)
            if inner:
                prepared.transforms[name] = BlockGrid(data, fmt, (weight.shape[0], weight.shape[1]))
            else:
                self._fix(prepared, name, data)
        return prepared

    def _fix(self, prepared: Prepared, name: str, data: Bytes) -> None:
        self._fixed[name] = data
        shape = prepared.weights[name].shape
        prepared.weights[name] = torch.from_numpy(
            dequantize(self.formats[name], data.reshape(-1).data).reshape(shape).copy()
        )
        prepared.frozen.add(name)

    def write(self, model: TrainableDecoder, target: Path, progress: Progress, group: Group, *, force: bool) -> int:
        """As GridPlan."""
        trained: dict[str, tuple[QuantFormat, Bytes]] = {}
        for name, weight, transform in walked(model, group):
            fmt = self.formats[name]
            if isinstance(transform, BlockGrid):
                trained[name] = fmt, transform.export(weight)
            elif weight.dim() == 1:
                trained[name] = fmt, float_bytes(weight.cpu().numpy(), fmt)
        if not group.leads:
            return 0
        trained |= {name: (self.formats[name], data) for name, data in self._fixed.items()}
        report = write_trained_gguf(
            self._model.checkpoint, target, trained, progress, file_type=self._mix.file_type, force=force
        )
        return report.target_bytes


def walked(model: TrainableDecoder, group: Group) -> Iterator[tuple[str, torch.Tensor, nn.Module | None]]:
    """Every weight by canonical name, with its transform: whole until the next is asked for. Every process must come.

    Copies, because the storage of a shard's whole is freed afterwards, which a view in numpy would forbid.
    """
    with group.whole(model):
        for name, weight in model.outer.items():
            yield name, weight.detach().float().clone(), _at(model.outer_transforms, name)
    for i, layer in enumerate(model.blocks()):
        with group.whole(layer):
            for key, weight in layer.weights.items():
                yield f"layers.{i}.{key.replace('/', '.')}", weight.detach().float().clone(), _at(layer.transforms, key)


def _at(modules: nn.ModuleDict, key: str) -> nn.Module | None:
    return dict(modules.items()).get(key)


def _override(text: str) -> tuple[str, str]:
    pattern, separator, name = text.rpartition("=")
    if not separator or not pattern or not name:
        raise ConfigError(f"tensor takes REGEX=TYPE, for example 'ffn_down=Q6_K', not {text!r}")
    return pattern, name
