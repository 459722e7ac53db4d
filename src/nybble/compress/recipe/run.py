"""Runs a recipe: its stages in order, each kept when it is finished, then one report about all of them."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nybble.checkpoint import open_checkpoint
from nybble.compress.calibration.text import SELF, OwnText
from nybble.compress.gguf.write import check_target
from nybble.compress.methods import Progress
from nybble.compress.recipe.measure import measure
from nybble.compress.recipe.plan import KINDS, Recipe, Stage, with_teacher
from nybble.compress.recipe.report import CompressReport, StageEntry, write_report
from nybble.compress.recipe.work import Finished, RecipeFolder
from nybble.core.errors import ConfigError, NybbleError, OutputError
from nybble.formats.output_folder import refuse_existing_folder

_VERSION = 1  # of what lies in the working folder


@dataclass(frozen=True, slots=True)
class Compressed:
    """What a recipe left: the model, its report, and where that lies."""

    target: Path
    report_folder: Path
    report: CompressReport


def report_folder(target: Path) -> Path:
    """Where the report about a model goes."""
    return target.with_name(f"{target.name}.report")


def compress(
    source: Path,
    target: Path,
    recipe: Recipe,
    *,
    progress: Progress,
    resume: bool = False,
    force: bool = False,
    threads: int | None = None,
) -> Compressed:
    """Make `source` smaller as the recipe says, and write it to `target`, the report to `report_folder(target)`.

    resume: go on where an interrupted run stopped; finished stages are not done again. threads: of the measurements.
    `source` writes the text of stages that want `self`.

    Raises:
        ConfigError: the recipe does not fit the model or the target.
        OutputError: the target exists, cannot be written, or there is unfinished work that would be lost.
        CheckpointError, TokenizerError, ModelNotFoundError, TrainingError: as the stages do.
    """
    names = recipe.targets(source, target)
    check_targets(source, target, force=force)
    open_checkpoint(source).close()
    with RecipeFolder(target) as folder:
        if not resume and not force and folder.num_finished() + folder.started(names[0]):
            raise OutputError(
                f"{folder.path} holds an unfinished run ({folder.num_finished()} stages done): go on with --resume, "
                "or start again with --force"
            )
        finished = _stages(source, recipe, names, folder, progress, resume=resume)
        paths = [source, *(one.path for one in finished)]
        progress.note(f"measuring {len(paths)} models")
        measured = measure(paths, recipe.report, folder.path, progress, threads=threads)
        entries = [
            StageEntry(stage.kind, said(stage), one.result, one.seconds)
            for stage, one in zip(recipe.stages, finished, strict=True)
        ]
        report = CompressReport(recipe.name, source.name, target.name, tuple(entries), measured)
        written = write_report(report, folder.path / "report")
        folder.deliver(finished[-1].path, written, report_folder(target))
    return Compressed(target, report_folder(target), report)


def check_targets(source: Path, target: Path, *, force: bool) -> None:
    """Raises OutputError or ConfigError for a target that cannot be written."""
    if target.suffix.lower() == ".gguf":
        check_target(source, target, force=force)
    else:
        refuse_existing_folder(target, force=force)
        if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
            raise ConfigError(f"{target} is the source, or has it inside: write to another name")
    report = report_folder(target)
    if report.exists() and not (force and (report / "report.json").is_file()):
        raise OutputError(f"{report} exists already: choose another name, or replace it with --force")
    if not target.parent.is_dir():
        raise OutputError(f"{target} cannot be written: the folder {target.parent} does not exist")


def _stages(
    source: Path,
    recipe: Recipe,
    names: list[str],
    folder: RecipeFolder,
    progress: Progress,
    *,
    resume: bool,
) -> list[Finished]:
    found: list[Finished] = []
    path, identity = source, _identity(source)
    for stage, name in zip(recipe.stages, names, strict=True):
        stage = with_teacher(stage, source)
        identity = hashlib.sha256(f"{identity} {stage.kind} {stage.options}".encode()).hexdigest()
        done = folder.finished(name, identity) if resume else None
        if done is None:
            progress.note(f"stage {stage.number} of {len(recipe.stages)}: {stage.kind}")
            stage = _calibrated_on(stage, source)
            done = _run(stage, path, folder, name, identity, progress, resume=resume)
        else:
            progress.note(f"stage {stage.number} of {len(recipe.stages)}: {stage.kind} is finished already")
        found.append(done)
        path = done.path
    return found


def _calibrated_on(stage: Stage, source: Path) -> Stage:
    """The stage with the recipe's source as what writes its text, where it would write one itself."""
    options: Any = stage.options
    if getattr(options, "calibrate", None) != SELF:
        return stage
    return replace(stage, options=replace(options, calibrate=OwnText(source)))


def _run(
    stage: Stage,
    source: Path,
    folder: RecipeFolder,
    name: str,
    identity: str,
    progress: Progress,
    *,
    resume: bool,
) -> Finished:
    same = folder.begin(name, identity)
    run = KINDS[stage.kind].run
    began = time.perf_counter()
    try:
        result = run(source, folder.path / name, stage.options, progress=progress, resume=resume and same)
    except NybbleError as e:
        raise type(e)(f"stage {stage.number} ({stage.kind}): {e}") from e
    return folder.finish(name, identity, result, time.perf_counter() - began)


def said(stage: Stage) -> dict[str, object]:
    """The options that differ from what they are by default."""
    kind = type(stage.options)
    fields = {name: getattr(stage.options, name) for name in kind.__dataclass_fields__}
    defaults = {name: field.default for name, field in kind.__dataclass_fields__.items()}
    given = {name: value for name, value in fields.items() if value != defaults[name]}
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in given.items()}


def _identity(source: Path) -> str:
    files = [source] if source.is_file() else sorted([*source.glob("*.safetensors"), source / "config.json"])
    facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]
    return hashlib.sha256(repr((_VERSION, str(source.resolve()), facts)).encode()).hexdigest()
