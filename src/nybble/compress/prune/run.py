"""Prunes a model from one path to another, layer by layer, in a working folder that an interrupted run goes on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from nybble.compress.gguf.model_keys import model_keys
from nybble.compress.gguf.write import check_target
from nybble.compress.methods import Progress
from nybble.compress.prune.depth import Depth
from nybble.compress.prune.layers import LayerFiles, PrunedLayer
from nybble.compress.prune.options import PruneOptions
from nybble.compress.prune.result import (
    Pruned,
    folder_config,
    gguf_source,
    num_weights,
    write_folder,
    write_gguf,
)
from nybble.compress.prune.width import Width
from nybble.compress.prune.zeros import Zeros
from nybble.compress.safetensors.model import FolderModel, open_folder_model
from nybble.compress.stage import StageResult, partial
from nybble.core.errors import ConfigError, OutputError
from nybble.core.spec import ModelSpec
from nybble.formats.output_folder import OutputFolder, WorkFolder, refuse_existing_folder
from nybble.formats.safetensors import SafeTensor, read_file
from nybble.formats.safetensors_writer import Entry, write_safetensors

Told = Callable[[int, str], None]
_OUTER = "outer.safetensors"
_VERSION = 1  # of what lies in the working folder


class Walk(Protocol):
    """One way to prune, on one model."""

    @property
    def passes(self) -> float:
        """How long it takes before the first layer, in runs over all layers; for the time left."""

    @property
    def sources(self) -> list[int]:
        """The layers that stay; known once it has started."""

    def plan(self, progress: Progress) -> Mapping[str, object]:
        """Everything besides the source and the options that decides what the result is."""

    def start(self, work: Path, first: int, told: Told) -> list[str]:
        """Called before the first layer that is not done yet; gives sentences worth reading."""

    def layer(self, position: int, told: Told) -> PrunedLayer:
        """What becomes of the `position`-th layer that stays. told: how many weights are done, and of what."""

    def figures(self, measured: list[Mapping[str, object]]) -> dict[str, object]:
        """For the report, from what was measured in the layers."""

    def scratch(self) -> list[str]:
        """Names of files in the working folder that the result does not have."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What will come out, before it is done. exact: the widths are known already."""

    weights_before: int
    weights_after: int
    target_bytes: int
    exact: bool


def run_prune(
    src: Path,
    dst: Path,
    options: PruneOptions,
    *,
    progress: Progress,
    resume: bool,
    force: bool = False,
) -> StageResult:
    """Write the pruned model to `dst`: a GGUF file if its name ends so, else a Hugging Face folder.

    Raises:
        ConfigError: the options do not fit the model, or the target cannot say the result.
        CheckpointError, TokenizerError, ModelNotFoundError: the source cannot be read, or has a NaN.
        OutputError: the target exists or cannot be written.
    """
    is_file = _check_target(src, dst, force=force)
    model = _open(src)
    for note in model.notes:
        progress.note(note)
    walk = make_walk(model, options)
    expected = expected_spec(model, options)
    if expected is not None:
        check_sayable(model, expected, list(range(len(expected.layers))), is_file=is_file)
    work = partial(dst)
    if not resume and work.exists():
        if LayerFiles(work).num_done() and not force:
            raise OutputError(
                f"{work} holds unfinished layers of an earlier run: go on with --resume, or start again with --force"
            )
        shutil.rmtree(work)
    plan: dict[str, object] = {
        **walk.plan(progress),
        "source": _identity(src),
        "options": str(options),
        "version": _VERSION,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        with _working(dst, plan, work, force=force, is_file=is_file) as folder:
            pruned, notes, figures = _layers(model, walk, work, progress, is_file=is_file)
            if isinstance(folder, OutputFolder):
                own = (work / name for name in (_OUTER, *walk.scratch()))
                size = write_folder(pruned, folder, [*LayerFiles(work).files(len(pruned.layers)), *own])
            else:
                size = write_gguf(gguf_source(pruned), pruned, dst, _Muted(progress), force=force)
                shutil.rmtree(work)
    finally:
        torch.set_num_threads(threads)
    before, after = num_weights(model.spec), pruned.num_weights()
    figures = {
        "parameters_before": before,
        "parameters_after": after,
        "bytes_before": model.checkpoint.file_bytes,
        "bytes_after": size,
        **_shape_figures(pruned),
        **figures,
    }
    return StageResult(figures, notes=tuple(notes))


def predict(src: Path, dst: Path, options: PruneOptions) -> Prediction:
    """What `run_prune` would write. Raises as it does, but for the target."""
    model = _open(src)
    make_walk(model, options)  # refuses what does not fit
    spec = expected_spec(model, options)
    exact = spec is not None
    if spec is None:
        spec = likely_spec(model, options)
    else:
        check_sayable(model, spec, list(range(len(spec.layers))), is_file=dst.suffix.lower() == ".gguf")
    after = num_weights(spec)
    return Prediction(num_weights(model.spec), after, after * (4 if model.dtype == "F32" else 2), exact)


def make_walk(model: FolderModel, options: PruneOptions) -> Walk:
    """Raises ConfigError for options that do not fit the model."""
    if options.kind == "zeros":
        return Zeros(model, options)
    return Depth(model, options) if options.kind == "depth" else Width(model, options)


def expected_spec(model: FolderModel, options: PruneOptions) -> ModelSpec | None:
    """Of the result, where it is known before anything is measured."""
    if options.kind == "zeros":
        return model.spec
    if options.kind == "width" and options.scope != "global":
        return Width(model, options).uniform_spec()
    return None


def likely_spec(model: FolderModel, options: PruneOptions) -> ModelSpec:
    """One of about the size that the result will have."""
    if options.kind == "width":
        return Width(model, options).uniform_spec()
    return replace(model.spec, layers=model.spec.layers[options.num_dropped(model.num_layers) :])


def check_sayable(model: FolderModel, spec: ModelSpec, sources: list[int], *, is_file: bool) -> None:
    """Raises ConfigError or CheckpointError for a model that the target's format cannot say."""
    if is_file:
        model_keys(replace(model.checkpoint, spec=spec))
    else:
        folder_config(model, spec, sources)


def _open(src: Path) -> FolderModel:
    """A folder whose matrices are all float32 stays so; all else is in 16 bits."""
    model = open_folder_model(src)
    matrices = {t.format.name for t in model.checkpoint.tensors.values() if len(t.shape) == 2 and t.packed is None}
    if matrices == {"F32"} and model.checkpoint.container == "safetensors":
        return model.in_dtype("F32")
    return model


def _check_target(src: Path, dst: Path, *, force: bool) -> bool:
    """Whether it is a file."""
    if dst.suffix.lower() == ".gguf":
        check_target(src, dst, force=force)
        return True
    refuse_existing_folder(dst, force=force)
    if dst.resolve() == src.resolve() or dst.resolve() in src.resolve().parents:
        raise ConfigError(f"{dst} is the source, or has it inside: write to another name")
    return False


def _working(dst: Path, plan: dict[str, object], work: Path, *, force: bool, is_file: bool) -> WorkFolder:
    if is_file:
        return WorkFolder(work, plan, target=dst)
    return OutputFolder(dst, plan, force=force, work=work)


def _identity(source: Path) -> list[object]:
    files = [source] if source.is_file() else sorted([*source.glob("*.safetensors"), source / "config.json"])
    return [str(source.resolve()), *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists())]


def _layers(
    model: FolderModel, walk: Walk, work: Path, progress: Progress, *, is_file: bool
) -> tuple[Pruned, list[str], dict[str, object]]:
    """Prune the layers that are not done yet."""
    files = LayerFiles(work)
    first = files.num_done()
    weights = sum(module.num_weights for module in model.all_modules())
    progress.start(int(weights * (1 + walk.passes)))
    if first:
        progress.note(f"{first} layers are finished already, from an earlier run")
    notes = walk.start(work, first, progress.advance)
    for note in notes:
        progress.note(note)
    for index in range(min(first, len(walk.sources))):
        for module in model.modules(walk.sources[index]):
            progress.advance(module.num_weights, module.stem)
    if first < len(walk.sources):
        spec = replace(model.spec, layers=tuple(model.spec.layers[i] for i in walk.sources))
        check_sayable(model, spec, walk.sources, is_file=is_file)  # before hours of work: what layers were dropped
    for index in range(first, len(walk.sources)):
        files.write(index, walk.layer(index, progress.advance))
    outer = [Entry.of(name, model.plain(name)) for name in model.outer()]
    write_safetensors(work / _OUTER, outer, force=True)
    layers = [files.read(index, model.spec.layers) for index in range(len(walk.sources))]
    tensors: dict[str, SafeTensor] = {tensor.name: tensor for tensor in read_file(work / _OUTER)}
    figures = walk.figures([layer.figures for layer in layers])
    return Pruned(model, layers, tensors), notes, figures


def _shape_figures(pruned: Pruned) -> dict[str, object]:
    """What the layers are like: one number where they are alike, else one for each."""
    figures: dict[str, object] = {"layers": len(pruned.layers)}
    gone = sorted(set(range(pruned.model.num_layers)) - {layer.source for layer in pruned.layers})
    if gone:
        figures["removed_layers"] = gone
    for name, words in (("num_q_heads", "heads"), ("num_kv_heads", "kv_heads"), ("ffn_size", "neurons")):
        values = [getattr(layer.spec, name) for layer in pruned.layers]
        figures[words] = values[0] if len(set(values)) == 1 else values
    zeros = total = 0
    for layer in pruned.layers:
        for tensor in layer.tensors.values():
            if len(tensor.shape) == 2:
                zero, size = _zeros(tensor)
                zeros, total = zeros + zero, total + size
    figures["sparsity"] = zeros / max(1, total)
    return figures


def _zeros(tensor: SafeTensor) -> tuple[int, int]:
    """How many weights of a tensor are zero, of either sign, and how many there are."""
    sign, kind = (0x7FFFFFFF, "<u4") if tensor.format.name == "F32" else (0x7FFF, "<u2")
    bits = np.frombuffer(tensor.file.view[tensor.begin : tensor.end], kind)
    return int(bits.size - np.count_nonzero(bits & sign)), bits.size


class _Muted:
    """Writing the file is not counted: it is fast, and its own count would start again."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def start(self, total: int) -> None:
        pass

    def advance(self, weights: int, what: str) -> None:
        pass

    def note(self, message: str) -> None:
        self._progress.note(message)
