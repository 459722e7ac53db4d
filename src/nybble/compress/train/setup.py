"""What every training command does before and after its loop: threads, data, the working folder, the log's figures."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import torch

from nybble.checkpoint import Checkpoint
from nybble.compress.methods import Progress
from nybble.compress.stage import StageResult
from nybble.compress.train.data import Sequences, load_sequences, writes_itself
from nybble.compress.train.group import Group
from nybble.compress.train.log import read_log
from nybble.compress.train.loop import Trained, wants_bf16
from nybble.compress.train.options import TrainOptions
from nybble.core.errors import ConfigError, ModelNotFoundError, OutputError
from nybble.formats.output import refuse_existing
from nybble.formats.output_folder import refuse_existing_folder

# A run goes on whatever these are: how often it saves, how fast it computes, how fast it learns from now on.
_FREE = ("save_minutes", "threads", "learning_rate")
_MOST_TOKENS = 2_000_000
_SELF_SHARE = 0.5  # of what a run reads, at most: text that the teacher writes costs more than to read it twice
_MOST_SELF = 400_000
_SELF_PER_MINUTE = 3000  # of a run that is asked for minutes: half of what two cores read of a small model
LOG_NAME = "train.jsonl"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # names of mallopt(3)


@contextmanager
def computing(threads: int | None) -> Iterator[None]:
    """As long as the block lasts torch has so many threads, None: as many as it had.

    From now on large tensors are backed by huge pages, if torch has made none so far, and what is freed stays with the
    process: a step frees and takes all activations and gradients, and otherwise loses a tenth of its time, in virtual
    machines up to a third, to having them handed over page by page.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _keep_freed_memory() -> None:
    """With glibc, whose malloc else gives large blocks back to the system at once."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def settled(options: TrainOptions, group: Group) -> TrainOptions:
    """The options with bf16 decided."""
    return replace(options, bf16=wants_bf16(options, group.device))


def identity(
    kind: str, source: Path, said: object, options: TrainOptions, data: Sequences, processes: int
) -> dict[str, object]:
    """What decides a run's result: who takes it up again must want the same. said: the options of this kind."""
    names = [f.name for f in fields(TrainOptions) if f.name not in _FREE]
    return {
        "kind": kind,
        "source": files_of(source),
        "options": said,
        "training": {name: getattr(options, name) for name in names},
        "text": data.digest,
        "processes": processes,
    }


def files_of(source: Path) -> list[object]:
    """Where a model's files are, how large and how old: whether it is still the same."""
    files = [source] if source.is_file() else sorted([*source.glob("*.safetensors"), source / "config.json"])
    return [str(source.resolve()), *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.exists())]


def load_data(checkpoint: Checkpoint, options: TrainOptions, group: Group, progress: Progress) -> Sequences:
    """As many sequences as a run can use. Raises as `load_sequences`."""
    steps = options.num_steps
    wanted = _MOST_TOKENS if steps is None else steps * options.tokens_per_step * group.size
    worth_writing = wanted * _SELF_SHARE if options.minutes is None else options.minutes * _SELF_PER_MINUTE
    own_tokens = options.tokens or min(_MOST_SELF, max(4 * options.seq_len, int(worth_writing)))
    tokens = options.tokens or (own_tokens if writes_itself(options.data) else min(wanted, _MOST_TOKENS))
    found = None
    if group.leads:
        found = load_sequences(
            checkpoint,
            options.data,
            seq_len=options.seq_len,
            tokens=tokens,
            own_tokens=own_tokens,
            seed=options.seed,
            progress=progress,
        )
        count, length = found.token_ids.shape
        progress.note(f"{count} sequences of {length - 1} tokens of {found.name}")
    ids = {} if found is None else {"token_ids": torch.from_numpy(found.token_ids)}
    name, tensors = group.share(found and found.name, ids)
    return Sequences(tensors["token_ids"].numpy(), name)


def check_paths(source: Path, target: Path, *, force: bool) -> None:
    """Raises ModelNotFoundError, OutputError or ConfigError before any work is done."""
    if not source.exists():
        raise ModelNotFoundError(f"{source} does not exist: give a GGUF file or a model folder")
    if target.suffix.lower() == ".gguf":
        refuse_existing(target, force=force)
    else:
        refuse_existing_folder(target, force=force)
    if target.exists() and target.samefile(source):
        raise ConfigError(f"{target} is the model itself: write to another name")
    if not target.resolve().parent.is_dir():
        raise OutputError(f"{target} cannot be written: the folder {target.parent} does not exist")


def keep_log(run_log: Path, target: Path) -> Path:
    """The log beside the result: in a folder, or next to a file."""
    kept = target / LOG_NAME if target.is_dir() else target.with_name(f"{target.stem}.{LOG_NAME}")
    try:
        shutil.copyfile(run_log, kept)
    except OSError as e:
        raise OutputError(f"{kept} cannot be written: {e.strerror or e}") from e
    return kept


def stage_result(trained: Trained, log: Path, figures: Mapping[str, object], notes: tuple[str, ...]) -> StageResult:
    """What a run leaves behind."""
    losses = [float(str(line["loss"])) for line in read_log(log) if "loss" in line]
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / len(part) if part else math.nan for part in (losses[:tenth], losses[-tenth:]))
    said: dict[str, object] = {
        "steps": trained.steps,
        "tokens": trained.tokens,
        "seconds": round(trained.seconds, 1),
        "first_loss": round(first, 5),
        "last_loss": round(last, 5),
    }
    return StageResult({**said, **figures}, log, notes)
