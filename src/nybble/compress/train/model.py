"""A model on its way into training and out again: into a folder or a GGUF file, whichever container it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from nybble.checkpoint import Checkpoint, Tensor, open_checkpoint
from nybble.compress.gguf.mixes import is_quantised
from nybble.compress.gguf.source import Source, SourceTensor, open_source, source_of
from nybble.compress.gguf.write import make_plan, write
from nybble.compress.methods import Progress, QuantizeReport
from nybble.compress.safetensors.model import FolderModel, Module, open_folder_model
from nybble.compress.safetensors.side_files import write_side_files
from nybble.core.errors import CheckpointError
from nybble.formats.gguf_writer import TensorInfo
from nybble.formats.output_folder import OutputFolder
from nybble.formats.safetensors_writer import Entry, write_json, write_shards
from nybble.formats.stored import Stored, floats_as
from nybble.quant.formats import FORMATS, QuantFormat

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TrainModel:
    """checkpoint: in the order of rows that is trained. folder: the same as a folder has it; None for GGUF files."""

    checkpoint: Checkpoint
    folder: FolderModel | None

    def weights(self) -> dict[str, torch.Tensor]:
        """Every tensor, float32, by canonical name. Raises CheckpointError for a NaN or an infinity."""
        return {name: torch.from_numpy(self.read(name)) for name in self.checkpoint.tensors}

    def read(self, name: str) -> Floats:
        """One tensor. Raises CheckpointError for a NaN or an infinity."""
        tensor = self.checkpoint.tensors[name]
        values = np.array(tensor.to_float32(), np.float32)
        self.checkpoint.release(tensor)
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.checkpoint.path}: the tensor {name!r} holds a NaN or an infinity: get the file again"
            )
        return values

    @property
    def num_weights(self) -> int:
        return sum(int(np.prod(tensor.shape)) for tensor in self.checkpoint.tensors.values())


def open_train_model(path: Path, target: Path) -> TrainModel:
    """What is at `path`, to be written to `target`: as a GGUF file if its name ends so.

    Raises:
        ModelNotFoundError: there is nothing at `path`.
        CheckpointError: it is damaged, or cannot be said in a folder.
    """
    if target.suffix.lower() == ".gguf":
        return TrainModel(open_checkpoint(path), None)
    folder = open_folder_model(path)
    return TrainModel(folder.checkpoint, folder)


def write_trained_folder(
    folder: FolderModel,
    target: Path,
    *,
    vectors: Mapping[str, Floats],
    linear: Callable[[Module], Mapping[str, Stored]],
    config: Mapping[str, object] | None,
    force: bool,
) -> int:
    """A model folder; its bytes of weights. It appears when it is complete.

    vectors: trained tensors besides the linears of the layers (norms, embeddings), by canonical name; others are
    written as they are. linear: stored tensors of a linear. config: quantization_config.

    Raises OutputError if it cannot be written.
    """
    with OutputFolder(target, {"trained": str(folder.checkpoint.path)}, force=force) as out:
        entries = [Entry.of(folder.stored_name(n), folder.plain(n, vectors.get(n))) for n in folder.outer()]
        entries.sort(key=lambda entry: "embed" not in entry.name)
        for index in range(folder.num_layers):
            for name in folder.layer_vectors(index):
                entries.append(Entry.of(folder.stored_name(name), folder.plain(name, vectors.get(name))))
            for module in folder.modules(index):
                entries += [Entry.of(name, stored) for name, stored in linear(module).items()]
        write_shards(out.work, entries)
        write_side_files(folder.checkpoint, out.work)
        said = dict(folder.config)
        if config is not None:
            said["quantization_config"] = config
        write_json(out.work / "config.json", said)
        out.commit([])
    return sum(entry.num_bytes for entry in entries)


def plain_linear(folder: FolderModel, values: Mapping[str, Floats]) -> Callable[[Module], Mapping[str, Stored]]:
    """Linears as the folder has them unquantised. values: by canonical name."""

    def stored(module: Module) -> Mapping[str, Stored]:
        names = [f"layers.{module.layer}.{part}" for part in module.parts]
        parts = [folder.plain(name, values.get(name)) for name in names]
        return {f"{module.stem}.weight": Stored(parts[0].dtype, np.concatenate([part.array for part in parts]))}

    return stored


def gguf_source(checkpoint: Checkpoint) -> Source:
    """What a GGUF file with this model has, before anything is trained. Raises as `open_source`."""
    return open_source(checkpoint.path) if checkpoint.container == "gguf" else source_of(checkpoint)


def write_trained_gguf(
    checkpoint: Checkpoint,
    target: Path,
    trained: Mapping[str, tuple[QuantFormat, Bytes]],
    progress: Progress,
    *,
    file_type: int,
    force: bool,
) -> QuantizeReport:
    """A GGUF file. trained: rows of blocks by canonical name, in the checkpoint's order of rows; all else stays.

    Raises OutputError if it cannot be written, CheckpointError for what GGUF cannot say.
    """
    given = {name: replace_bytes(checkpoint.tensors[name], fmt, data) for name, (fmt, data) in trained.items()}
    if checkpoint.container == "gguf":
        source = _with_tensors(open_source(checkpoint.path), checkpoint, given)
    else:
        source = source_of(replace(checkpoint, tensors={**checkpoint.tensors, **given}))
    formats = [tensor.info.format for tensor in source.tensors]
    plan = make_plan(source, formats, file_type, {}, ())
    write(plan, target, progress, force=force)
    return plan.report


def replace_bytes(tensor: Tensor, fmt: QuantFormat, data: Bytes) -> Tensor:
    """The same tensor with other bytes. Norms are given as they are used, so nothing is added to them any more."""
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return Tensor(tensor.name, tensor.shape, fmt, flat.data, plus_one=False)


def _with_tensors(source: Source, checkpoint: Checkpoint, given: Mapping[str, Tensor]) -> Source:
    """A file's tensors, some of them exchanged. Parts of one stored tensor are all given, or none."""
    parts: dict[str, list[str]] = {}
    for name, where in checkpoint.sources.items():
        parts.setdefault(where.name, []).append(name)
    tensors = []
    for tensor in source.tensors:
        names = [name for name in parts.get(tensor.info.name, []) if name in given]
        tensors.append(_exchanged(tensor, [given[name] for name in names]) if names else tensor)
    return replace(source, tensors=tensors)


def _exchanged(tensor: SourceTensor, parts: list[Tensor]) -> SourceTensor:
    info = TensorInfo(tensor.info.name, tensor.info.shape, parts[0].format)
    data = b"".join(part.data for part in parts)
    return SourceTensor(info, lambda: memoryview(data), tensor.release)


def float_bytes(values: Floats, fmt: QuantFormat) -> Bytes:
    """Values as F32, F16 or BF16. Raises CheckpointError if one leaves the range."""
    with np.errstate(over="ignore"):
        array = floats_as(values, fmt.name).array
    if fmt.name == "F16" and not np.isfinite(array).all():
        raise CheckpointError("a trained weight is beyond 65504, which float16 cannot hold: train on from a BF16 model")
    return array.reshape(-1).view(np.uint8)


def matrix_formats(source: Source) -> dict[str, QuantFormat]:
    """What a plain GGUF file keeps its tensors in: matrices in 16 bits, vectors in 32, by the file's names."""
    kinds = {t.info.format.name for t in source.tensors if is_quantised(t.info)}
    short = "BF16" if kinds == {"BF16"} else "F16"
    return {t.info.name: FORMATS[short if is_quantised(t.info) else "F32"] for t in source.tensors}
