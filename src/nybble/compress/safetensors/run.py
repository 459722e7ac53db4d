"""Walks a model layer by layer and writes the folder: resumes, bounds memory, and gives the name only at the end.

Each finished layer lies in a file of its own in `.NAME.part`; when all are there they are joined. A pass sees one layer
at a time and says what its linears have become.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from nybble.compress.calibration.own_text import writing_bytes
from nybble.compress.calibration.text import SELF
from nybble.compress.methods import Progress, QuantizeReport, QuantizeRequest, expected_time
from nybble.compress.safetensors.model import Floats, FolderModel, Module, open_folder_model
from nybble.compress.safetensors.side_files import write_side_files
from nybble.core.errors import ConfigError
from nybble.formats.output_folder import OutputFolder, refuse_existing_folder
from nybble.formats.safetensors import SafeTensor, read_file, read_json
from nybble.formats.safetensors_writer import Entry, shards_bytes, write_json, write_safetensors, write_shards
from nybble.formats.stored import Stored, size_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

REPORT = "quantization_report.json"


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What has become of a layer.

    stored: the tensors of its quantised linears, by the folder's names. vectors: norms and biases that have changed, by
    canonical name. errors: of each linear, what the pass measured.
    """

    stored: Mapping[str, Stored]
    vectors: Mapping[str, Floats] = field(default_factory=dict)
    errors: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


class LayerPass(Protocol):
    """One way to quantise, on one model. model: the one whose unquantised tensors are written."""

    @property
    def model(self) -> FolderModel: ...

    def plan(self, progress: Progress) -> Mapping[str, object]:
        """Everything besides the source and the type that decides what the result is. Raises as `load_calibration`."""

    def config(self) -> Mapping[str, object] | None:
        """quantization_config; None for a folder that is not quantised."""

    def type_of(self, module: Module) -> str:
        """The name of the type that a linear gets, for the table of the report."""

    def empty(self, module: Module) -> Mapping[str, Stored]:
        """Stored tensors of a linear of zeros: as large as the real ones."""

    def peak_bytes(self) -> int:
        """Memory that a layer will take, about."""

    def seconds(self) -> float:
        """How long it will take, about. Measures for a moment."""

    def start(self, work: Path, first_layer: int) -> list[str]:
        """Called before the first layer that is not finished yet; gives sentences worth reading."""

    def layer(self, index: int, told: Callable[[Module], None]) -> LayerResult:
        """Quantise a layer. told: called after each linear."""

    def summary(self, errors: Mapping[str, Mapping[str, object]]) -> list[str]:
        """Sentences on how it went, from what the layers measured."""

    def scratch(self) -> list[str]:
        """Names of files in the working folder that the result does not have."""


def quantize_folder(
    request: QuantizeRequest,
    progress: Progress,
    make: Callable[[FolderModel], LayerPass],
) -> QuantizeReport:
    """Write `request.target`, or with dry_run only say what would be written.

    make: the pass for the model. An unfinished folder is only taken up again for the same source, type and plan.

    Raises:
        ConfigError: an option cannot be used.
        CheckpointError, TokenizerError, ModelNotFoundError: the source cannot be read, or has a NaN.
        OutputError: the target exists or cannot be written.
    """
    if not request.dry_run:
        refuse_existing_folder(request.target, force=request.force)
        if request.target.resolve() == request.source.resolve():
            raise ConfigError(f"{request.target} is the source itself: choose another name")
    model = open_folder_model(request.source)
    layer_pass = make(model)
    model = layer_pass.model
    for note in model.notes:
        progress.note(note)
    plan = _plan(model, layer_pass)
    report = _predict(request, model, layer_pass, plan)
    if request.dry_run:
        expected = expected_time(layer_pass.seconds())
        progress.note(expected)
        return replace(report, notes=(*report.notes, expected))
    identity = {
        **layer_pass.plan(progress),
        "source": _identity(request.source),
        "method": request.method.name,
        "version": 1,
    }
    with OutputFolder(request.target, identity, force=request.force) as folder:
        progress.start(sum(m.num_weights for m in model.all_modules()) + sum(map(_joining, plan.entries)))
        errors = _layers(model, layer_pass, folder.work, progress)
        notes = layer_pass.summary(errors)
        for note in notes:
            progress.note(note)
        used = _join(model, plan.entries, folder.work, progress)
        _write_rest(model, layer_pass, folder.work)
        if request.options.get("report"):
            _write_report(folder.work / REPORT, request, report, errors, notes)
        drop = [*used, *(folder.work / name for name in layer_pass.scratch())]
        written = sum(path.stat().st_size for path in folder.work.glob("model*.safetensors"))
        folder.commit(drop)
    return QuantizeReport(
        report.source_bytes, written, report.num_weights, report.by_type, (*model.notes, *notes), report.peak_bytes
    )


def _identity(source: Path) -> list[object]:
    files = [source] if source.is_file() else sorted([*source.glob("*.safetensors"), source / "config.json"])
    return [str(source.resolve()), *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists())]


@dataclass(slots=True)
class _Plan:
    """Every tensor of the result, in the order of its files; per type how many tensors or linears and bytes."""

    entries: list[Entry] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, entries: Iterable[Entry]) -> None:
        """One tensor, or all of one linear."""
        self.counts[kind] += 1
        for entry in entries:
            self.entries.append(entry)
            self.sizes[kind] += entry.num_bytes


def _plan(model: FolderModel, layer_pass: LayerPass) -> _Plan:
    """Tensors of layers know their sizes here, not their values."""
    plan = _Plan()
    for name in sorted(model.outer(), key=lambda name: "embed" not in name):
        plan.add(model.dtype_of(name), [_outer(model, name)])
    known: dict[tuple[str, tuple[int, int]], dict[str, Entry]] = {}
    for index in range(model.num_layers):
        for name in model.layer_vectors(index):
            shape, dtype = model.checkpoint.tensors[name].shape, model.dtype_of(name)
            plan.add(dtype, [Entry(model.stored_name(name), dtype, shape, size_of(dtype, shape), bytes)])
        for module in model.modules(index):
            key = (layer_pass.type_of(module), module.shape)
            if key not in known:
                empty = layer_pass.empty(module)
                known[key] = {name.removeprefix(module.stem): Entry.of(name, empty[name]) for name in empty}
            plan.add(key[0], [replace(e, name=module.stem + suffix, read=bytes) for suffix, e in known[key].items()])
    return plan


def _predict(request: QuantizeRequest, model: FolderModel, layer_pass: LayerPass, plan: _Plan) -> QuantizeReport:
    by_type = {kind: (plan.counts[kind], size) for kind, size in plan.sizes.items()}
    source, total = model.checkpoint.file_bytes, shards_bytes(plan.entries)
    # What is in no layer is decoded, checked and stored again in one piece.
    outer = max((7 * prod(model.checkpoint.tensors[name].shape) for name in model.outer()), default=0)
    written = writing_bytes(model.checkpoint) if request.options.get("calibrate") == SELF else 0
    peak = max(layer_pass.peak_bytes(), outer, written)
    return QuantizeReport(source, total, model.num_weights, by_type, model.notes, peak)


def _layer_file(work: Path, index: int) -> Path:
    return work / f"layer-{index:04d}.safetensors"


def _layers(
    model: FolderModel, layer_pass: LayerPass, work: Path, progress: Progress
) -> dict[str, Mapping[str, object]]:
    """Quantise the layers that are not finished yet. Gives what was measured, in this run and in those before."""
    first = 0
    while first < model.num_layers and _layer_file(work, first).exists():
        first += 1
    if first:
        progress.note(f"{first} of {model.num_layers} layers are finished already, from an earlier run")
    errors: dict[str, Mapping[str, object]] = {}
    for index in range(first):
        errors |= _measured(_layer_file(work, index).with_suffix(".json"))
        for module in model.modules(index):
            progress.advance(module.num_weights, module.stem)
    if first < model.num_layers:
        for note in layer_pass.start(work, first):
            progress.note(note)
    for index in range(first, model.num_layers):
        result = layer_pass.layer(index, lambda module: progress.advance(module.num_weights, module.stem))
        vectors = {
            model.stored_name(name): model.plain(name, result.vectors.get(name)) for name in model.layer_vectors(index)
        }
        errors |= result.errors
        path = _layer_file(work, index)
        write_json(path.with_suffix(".json"), result.errors)
        write_safetensors(path, [Entry.of(n, s) for n, s in {**vectors, **result.stored}.items()], force=True)
    return errors


def _measured(path: Path) -> dict[str, Mapping[str, object]]:
    return {name: value for name, value in read_json(path).items() if isinstance(value, Mapping)}


def _joining(entry: Entry) -> int:
    """How long it takes to copy a tensor, about, in the weights that could be quantised meanwhile."""
    return entry.num_bytes // 8


def _join(model: FolderModel, planned: list[Entry], work: Path, progress: Progress) -> list[Path]:
    """One file, or some large ones, from the layers' files and the tensors outside of layers. Gives the former."""
    used: list[Path] = []
    lying: dict[str, SafeTensor] = {}
    for index in range(model.num_layers):
        path = _layer_file(work, index)
        used += [path, path.with_suffix(".json")]
        lying |= {tensor.name: tensor for tensor in read_file(path)}

    def told(entry: Entry) -> Entry:
        read = entry.read

        def copy() -> Buffer:
            progress.advance(_joining(entry), f"write {entry.name}")
            return read()

        return replace(entry, read=copy)

    write_shards(work, [told(_lying(lying[entry.name]) if entry.name in lying else entry) for entry in planned])
    return used


def _outer(model: FolderModel, name: str) -> Entry:
    shape, dtype = model.checkpoint.tensors[name].shape, model.dtype_of(name)

    def read() -> memoryview:
        return model.plain(name).array.reshape(-1).view(np.uint8).data

    return Entry(model.stored_name(name), dtype, shape, size_of(dtype, shape), read)


def _lying(tensor: SafeTensor) -> Entry:
    size = tensor.end - tensor.begin
    view = tensor.file.view[tensor.begin : tensor.end]
    return Entry(tensor.name, tensor.format.name, tensor.shape, size, lambda: view)


def _write_rest(model: FolderModel, layer_pass: LayerPass, work: Path) -> None:
    quantisation = layer_pass.config()
    config = dict(model.config)
    if quantisation is not None:
        config["quantization_config"] = quantisation
    write_side_files(model.checkpoint, work)
    write_json(work / "config.json", config)


def _write_report(
    path: Path,
    request: QuantizeRequest,
    report: QuantizeReport,
    errors: Mapping[str, Mapping[str, object]],
    notes: list[str],
) -> None:
    value: dict[str, object] = {
        "method": request.method.name,
        "options": {name: str(option) for name, option in request.options.items()},
        "source_bytes": report.source_bytes,
        "target_bytes": report.target_bytes,
        "bits_per_weight": round(report.bpw, 4),
        "by_type": {name: {"tensors": count, "bytes": size} for name, (count, size) in report.by_type.items()},
        "notes": notes,
        "linears": errors,
    }
    write_json(path, json.loads(json.dumps(value)))


def skipped(request: QuantizeRequest, modules: list[Module]) -> frozenset[str]:
    """Stems of linears that `--tensor REGEX=fp16` leaves in 16 bits. Raises ConfigError for any other type."""
    chosen = assigned(request, modules, ("fp16", "bf16"))
    return frozenset(chosen)


def assigned(request: QuantizeRequest, modules: list[Module], types: tuple[str, ...]) -> dict[str, str]:
    """Stem -> type, of the linears that an override names. Raises ConfigError."""
    chosen: dict[str, str] = {}
    for pattern, name in request.tensors:
        if name.lower() not in types:
            raise ConfigError(
                f"--tensor {pattern}={name}: with --to {request.method.name} the type can be {', '.join(types)}"
            )
        try:
            found = [module.stem for module in modules if re.search(pattern, f"{module.stem}.weight")]
        except re.error as e:
            raise ConfigError(f"--tensor {pattern}={name}: the pattern is not a regular expression: {e}") from e
        if not found:
            raise ConfigError(
                f"--tensor {pattern}={name} fits the name of no linear layer; they are called like {modules[0].stem}"
            )
        for stem in found:
            chosen.setdefault(stem, name.lower())
    return chosen
