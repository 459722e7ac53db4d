"""What a model's files say about it, without loading its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from nybble.checkpoint import Checkpoint, open_checkpoint

_MOST_KEPT = 64
_LONGEST_TEXT = 1 << 16
_LONGEST_LIST = 1 << 10


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """architecture: as the file names it. encoding: of most of its weights.

    metadata: a GGUF file's keys and values; None for one that is as long as the vocabulary, if they were left out. A
    folder has none. tensors: (name, encoding, shape with the slowest dimension first), by nybble's names.
    """

    container: str
    architecture: str
    encoding: str
    num_weights: int
    context: int
    hidden_size: int
    chat_template: str | None
    metadata: Mapping[str, object]
    tensors: tuple[tuple[str, str, tuple[int, ...]], ...]


def model_facts(path: Path, *, vocabulary: bool = False) -> ModelFacts:
    """Read the head of a model; kept for the next time, as long as the file does not change.

    vocabulary: with the values that are as long as the vocabulary, which are not kept.

    Raises:
        ModelNotFoundError: there is nothing at `path`.
        CheckpointError: what is there is damaged or not supported.
    """
    if vocabulary:
        return _read(path, short=False)
    try:
        status = (path / "config.json" if path.is_dir() else path).stat()
        return _kept(path, status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError:
        return _read(path, short=True)  # says what is wrong


@lru_cache(maxsize=_MOST_KEPT)
def _kept(path: Path, inode: int, size: int, mtime_ns: int) -> ModelFacts:
    """The three numbers change with the file."""
    return _read(path, short=True)


def _read(path: Path, *, short: bool) -> ModelFacts:
    checkpoint = open_checkpoint(path)
    try:
        weights: Counter[str] = Counter()
        for tensor in checkpoint.tensors.values():
            weights[tensor.format.name] += prod(tensor.shape)
        architecture = checkpoint.metadata.get("general.architecture")
        return ModelFacts(
            container=checkpoint.container,
            architecture=architecture if isinstance(architecture, str) else checkpoint.spec.family,
            encoding=weights.most_common(1)[0][0] if weights else "",
            num_weights=weights.total(),
            context=checkpoint.spec.context_length,
            hidden_size=checkpoint.spec.hidden_size,
            chat_template=checkpoint.chat_template,
            metadata=_metadata(checkpoint, short=short) if checkpoint.container == "gguf" else {},
            tensors=tuple((name, tensor.format.name, tensor.shape) for name, tensor in checkpoint.tensors.items()),
        )
    finally:
        checkpoint.close()


def _metadata(checkpoint: Checkpoint, *, short: bool) -> dict[str, object]:
    return {key: None if short and _is_long(value) else value for key, value in checkpoint.metadata.items()}


def _is_long(value: object) -> bool:
    return isinstance(value, Sized) and len(value) > (_LONGEST_TEXT if isinstance(value, str) else _LONGEST_LIST)
