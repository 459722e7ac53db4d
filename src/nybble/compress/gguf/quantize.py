"""The pass that writes a GGUF file in another type: from a GGUF file or from a Hugging Face folder."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from nybble.compress.gguf.imatrix import ImportanceMatrix, read_imatrix
from nybble.compress.gguf.mixes import MIXES, Assignment, Mix, assign, is_quantised, parse_overrides
from nybble.compress.gguf.source import open_source
from nybble.compress.gguf.timing import expected_seconds
from nybble.compress.gguf.write import check_target, make_plan, write
from nybble.compress.methods import Method, Progress, QuantizeReport, QuantizeRequest, expected_time, register
from nybble.core.errors import ConfigError
from nybble.formats.gguf_writer import Value

_FLOATS = ("F32", "F16", "BF16")


def quantize(request: QuantizeRequest, progress: Progress) -> QuantizeReport:
    """Write `request.target`, or with dry_run only say what would be written.

    Raises:
        ConfigError: an option cannot be used.
        CheckpointError, TokenizerError, ModelNotFoundError: the source cannot be read, or has a NaN.
        OutputError: the target exists or cannot be written.
    """
    if request.options:
        raise ConfigError(f"--{next(iter(request.options)).replace('_', '-')} does not go with {request.method.name}")
    if not request.dry_run:
        check_target(request.source, request.target, force=request.force)
    mix = MIXES[request.method.name]
    if mix.default in _FLOATS and request.imatrix is not None:
        raise ConfigError(f"--imatrix does not go with --to {mix.name}, which rounds every weight by itself")
    imatrix = None if request.imatrix is None else read_imatrix(request.imatrix)
    overrides = parse_overrides(request.tensors)
    source = open_source(request.source)
    infos = [tensor.info for tensor in source.tensors]
    assignments = assign(mix, source.facts, infos, has_imatrix=imatrix is not None, overrides=overrides)
    extra = {} if imatrix is None else _imatrix_keys(imatrix, request.imatrix)
    notes = _notes(assignments, imatrix, mix)
    plan = make_plan(source, [a.format for a in assignments], mix.file_type, extra, notes)
    for note in plan.report.notes:
        progress.note(note)
    if request.dry_run:
        expected = expected_time(expected_seconds(plan, imatrix, request.threads))
        progress.note(expected)
        return replace(plan.report, notes=(*plan.report.notes, expected))
    write(plan, request.target, progress, imatrix=imatrix, threads=request.threads, force=request.force)
    return plan.report


def _imatrix_keys(imatrix: ImportanceMatrix, path: Path | None) -> dict[str, Value]:
    keys: dict[str, Value] = {"quantize.imatrix.file": "" if path is None else path.name}
    if imatrix.datasets:
        keys["quantize.imatrix.dataset"] = imatrix.datasets[0]
    keys["quantize.imatrix.entries_count"] = len(imatrix.entries)
    if imatrix.num_chunks:
        keys["quantize.imatrix.chunks_count"] = imatrix.num_chunks
    return keys


def _notes(assignments: list[Assignment], imatrix: ImportanceMatrix | None, mix: Mix) -> list[str]:
    fallen = Counter((a.wanted, a.format.name, a.info.shape[-1]) for a in assignments if a.wanted is not None)
    notes = [
        f"matrices of width {width}, {count} of them, are {name} instead of {wanted}, whose blocks do not divide it"
        for (wanted, name, width), count in fallen.items()
    ]
    changed = dict.fromkeys(a.info.format.name for a in assignments if a.info.format is not a.format)
    coarse = [name for name in changed if name not in _FLOATS]
    if coarse:
        notes.append(f"the model is already quantised ({', '.join(coarse)}): what that cost is not undone")
    if mix.name == "Q2_K" and imatrix is None:
        notes.append("Q2_K without an importance matrix costs much: give one with --imatrix")
    if imatrix is not None:
        matrices = [a.info.name for a in assignments if is_quantised(a.info)]
        missing = [name for name in matrices if name not in imatrix.entries]
        if len(missing) == len(matrices):
            raise ConfigError("the importance matrix has no entry for any tensor of this model: it is for another one")
        layers = [name for name in missing if name.startswith("blk.")]
        if layers:
            notes.append(f"the importance matrix has nothing for {len(layers)} matrices, the first is {layers[0]}")
    return notes


for _mix in MIXES.values():
    register(Method(_mix.name, "gguf", _mix.summary, quantize))
