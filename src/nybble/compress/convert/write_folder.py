"""The end of every conversion to a folder: files in a working folder, the proof, then the name."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nybble.compress.convert.outcome import Conversion, Outcome, Steps
from nybble.compress.convert.proof import Proof
from nybble.compress.methods import Progress, QuantizeReport
from nybble.core.errors import ConfigError
from nybble.formats.output_folder import OutputFolder, refuse_existing_folder
from nybble.formats.safetensors_writer import SHARD_BYTES, Entry, shards_bytes, write_json, write_shards


@dataclass(frozen=True)
class FolderPlan:
    """What a folder will be. types: how each entry is counted in the report, the type of its tensor if it is missing.

    side_files: writes the tokenizer's files. prove: compares the folder, complete but for its name, with the source.
    may_change: values may differ, because it was asked for.
    """

    entries: Sequence[Entry]
    config: Mapping[str, object]
    side_files: Callable[[Path], None]
    prove: Callable[[Path, Progress], Proof]
    source_bytes: int
    num_weights: int
    peak_bytes: int
    types: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    may_change: bool = False

    def report(self) -> QuantizeReport:
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for entry in self.entries:
            name = self.types.get(entry.name, entry.dtype)
            counts[name] += 1
            sizes[name] += entry.num_bytes
        by_type = {name: (counts[name], sizes[name]) for name in counts}
        total = shards_bytes(self.entries, max_bytes=SHARD_BYTES)
        return QuantizeReport(self.source_bytes, total, self.num_weights, by_type, self.notes, self.peak_bytes)


def check_target(asked: Conversion) -> None:
    """Raises OutputError if something is there that may not be replaced, ConfigError if it is the source."""
    if asked.dry_run:
        return
    refuse_existing_folder(asked.target, force=asked.force)
    source, target = asked.source.resolve(), asked.target.resolve()
    if target == source or target in source.parents:
        raise ConfigError(f"{asked.target} is the source, or has it inside: write to another name")


def write_folder(asked: Conversion, plan: FolderPlan, progress: Progress) -> Outcome:
    """Write and prove. Nothing is left behind after an error.

    Raises:
        CheckpointError: values have changed that were not to change, or cannot be held by their new type.
        OutputError: the target cannot be written.
    """
    report = plan.report()
    for note in plan.notes:
        progress.note(note)
    if asked.dry_run:
        return Outcome(report, None)
    steps = Steps(progress, plan.num_weights, 2)
    with OutputFolder(asked.target, {"convert": str(asked.source.resolve())}, force=asked.force) as folder:
        try:
            write_shards(folder.work, [_told(entry, steps) for entry in plan.entries], max_bytes=SHARD_BYTES)
            write_json(folder.work / "config.json", plan.config)
            plan.side_files(folder.work)
            proof = plan.prove(folder.work, steps)
            if not plan.may_change:
                proof.demand(str(asked.target))
            folder.commit([])
        except BaseException:
            shutil.rmtree(folder.work, ignore_errors=True)  # there is nothing to take up again
            raise
    return Outcome(report, proof)


def _told(entry: Entry, steps: Steps) -> Entry:
    def read() -> memoryview:
        data = memoryview(entry.read())
        size = 1
        for dim in entry.shape:
            size *= dim
        steps.advance(size, entry.name)
        return data

    return Entry(entry.name, entry.dtype, entry.shape, entry.num_bytes, read)
