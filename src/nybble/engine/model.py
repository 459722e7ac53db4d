"""What the engine needs of a model and of a tokenizer."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from nybble.backends.cpu import Sampled, SampleRow, Step
from nybble.engine.text import Detokenizer


class Model(Protocol):
    """One decoder with its cache, on some hardware."""

    def new_cache(self, num_blocks: int) -> None:
        """Make room for so many blocks; what an earlier cache held is gone."""

    def execute(self, step: Step) -> npt.NDArray[np.float32]:
        """Run a ragged step; the logits of the rows that it asks for."""

    def sample(self, logits: npt.NDArray[np.float32], params: list[SampleRow]) -> list[Sampled]:
        """Draw one token from each row of logits."""


class Tokenizer(Protocol):
    """Only what turns tokens into text."""

    def stream(self) -> Detokenizer: ...
