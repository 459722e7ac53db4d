"""A LoRA on disk, matched to the model that it changes. Factors stay in the mapped file until somebody reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.core.errors import CheckpointError, ModelNotFoundError
from nybble.core.spec import ModelSpec
from nybble.families.adapters import Target, targets
from nybble.formats.adapter_file import AdapterFile, FactorPair
from nybble.formats.gguf_adapter import read_gguf_adapter
from nybble.formats.peft import read_peft_adapter

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to one matrix W of a layer: scale * b (a x), a [rank, in_features] and b [out_features, rank]."""

    name: str  # attn.q, ffn.down, ...
    a: npt.NDArray[np.float32]
    b: npt.NDArray[np.float32]
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """The factors of an adapter by layer. digest: the SHA-256 of its files, so what it is; rank: its largest."""

    path: Path
    digest: str
    rank: int
    _factors: Mapping[int, tuple[tuple[FactorPair, Target], ...]]

    def layers(self) -> Iterator[tuple[int, list[LowRank]]]:
        """One layer after the other, decoded only then. Raises CheckpointError for values that are not finite."""
        for layer, factors in self._factors.items():
            yield layer, [_low_rank(pair, target) for pair, target in factors]


def open_adapter(path: str | Path, spec: ModelSpec) -> Adapter:
    """A LoRA for a model of this spec: a PEFT folder (or the safetensors file in it), or a GGUF file.

    Raises:
        ModelNotFoundError: there is nothing at `path`.
        CheckpointError: what is there is damaged, hostile, not supported, or made for another model.
    """
    path = Path(path)
    if not path.exists():
        raise ModelNotFoundError(f"{path} does not exist: give a PEFT folder, or a GGUF or safetensors file of a LoRA")
    file = read_gguf_adapter(path) if _is_gguf(path) else read_peft_adapter(path)
    if file.architecture not in (None, spec.family):
        raise CheckpointError(f"{path} was made for a model of the family {file.architecture!r}, not {spec.family!r}")
    factors: dict[int, list[tuple[FactorPair, Target]]] = {}
    taken: dict[tuple[int, str], str] = {}
    for name, pair in file.pairs.items():
        found = targets(spec, name, container=file.container, where=str(path))
        _check_shapes(name, pair, found, path)
        for target in found:
            other = taken.setdefault((target.layer, target.name), name)
            if other != name:
                raise CheckpointError(f"{path}: {other!r:.80} and {name!r:.80} change the same weights: it is damaged")
            factors.setdefault(target.layer, []).append((pair, target))
    rank = max(pair.a.shape[0] for pair in file.pairs.values())
    return Adapter(path, _digest(file), rank, {layer: tuple(factors[layer]) for layer in sorted(factors)})


def _check_shapes(name: str, pair: FactorPair, found: list[Target], path: Path) -> None:
    rows, cols = found[-1].rows[1], found[-1].in_features
    if pair.a.shape[1] != cols or pair.b.shape[0] != rows:
        raise CheckpointError(
            f"{path}: the factors of {name!r:.80} are for a matrix of [{pair.b.shape[0]}, {pair.a.shape[1]}], the "
            f"model's is [{rows}, {cols}]: the adapter was made for another model"
        )


def _low_rank(pair: FactorPair, target: Target) -> LowRank:
    begin, end = target.rows
    b = pair.b.read()[begin:end]
    if target.reorder is not None:
        # What turns together lies half a head apart in Hugging Face's order, and side by side in llama.cpp's.
        first, second = (2, -1) if target.reorder == "interleave" else (-1, 2)
        b = b.reshape(target.heads, first, second, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
    return LowRank(target.name, pair.a.read(), b, pair.scale)


def _digest(file: AdapterFile) -> str:
    digest = hashlib.sha256()
    for content in file.contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _is_gguf(path: Path) -> bool:
    if path.is_dir():
        return False
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
