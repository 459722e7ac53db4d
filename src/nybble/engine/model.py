"""What the engine needs of a model and of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nybble.adapter import Adapter
from nybble.backends.cpu import Sampled, SampleRow, Scored, Step, StepAdapter
from nybble.engine.text import Detokenizer

Floats = npt.NDArray[np.float32]
# Rows of logits in the backend's own form: an array, or a tensor on a GPU. The engine counts rows, picks some with a
# list of their numbers, and hands them back to `sample`.
Logits = Any


class Model(Protocol):
    """A decoder that runs steps over a paged cache."""

    def new_cache(self, num_blocks: int) -> None:
        """Make room for so many blocks; what an earlier cache held is gone."""

    def execute(self, step: Step) -> Logits:
        """Run a ragged step; the logits of the rows that it asks for."""


class CacheBlocks(Protocol):
    """The blocks of one cache as bytes, [blocks, block_bytes]."""

    @property
    def block_bytes(self) -> int: ...

    def read(self, ids: Sequence[int]) -> npt.NDArray[np.uint8]: ...

    def write(self, ids: Sequence[int], data: npt.NDArray[np.uint8]) -> None: ...


class EngineModel(Model, Protocol):
    """What serving needs beyond that."""

    def hidden(self) -> Floats:
        """The hidden states that the last step asked for."""

    def sample(self, logits: Logits, params: list[SampleRow]) -> list[Sampled]:
        """Draw one token from each row of logits; BadLogitsError names the rows that allow none."""

    def score_hidden(self, hidden: Floats, target_ids: list[int], top: int = 0) -> list[Scored]:
        """What the model thinks of the given tokens after these hidden states."""

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy blocks of the cache, (from, to), in all layers."""

    def cache_blocks(self) -> CacheBlocks:
        """The blocks of the present cache as bytes."""


class LoadedWeights(EngineModel, Protocol):
    """And what loading a model and setting up its engine needs."""

    @property
    def isa(self) -> str:
        """What computes: an instruction set, or a device and a type."""

    @property
    def threads(self) -> int: ...

    @property
    def memory_bytes(self) -> int: ...

    @property
    def cache_bytes_per_block(self) -> int: ...

    def identity(self) -> bytes:
        """32 bytes that stand for all that the keys and values of a text depend on."""

    def load_adapter(self, adapter: Adapter) -> StepAdapter:
        """Make an adapter ready for steps."""

    def fitting_blocks(self, *, max_num_batched_tokens: int, max_num_seqs: int) -> int | None:
        """How many blocks the device has room for; None if they are kept in the machine's memory."""


class EngineTokenizer(Protocol):
    """What turns tokens into text, and words into tokens. Safe on any thread."""

    def encode(self, text: str, *, add_special: bool) -> list[int]: ...

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True) -> str: ...

    def stream(self, *, skip_special: bool = True) -> Detokenizer: ...
