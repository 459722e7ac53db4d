"""What training with quantisation in the loop is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nybble.compress.gguf.mixes import MIXES, Mix
from nybble.compress.qat.pack import LAYOUTS
from nybble.compress.stage import nearest
from nybble.compress.train.options import TrainOptions
from nybble.core.errors import ConfigError

# Type -> bits and inputs per scale, as round-to-nearest has them.
INTEGERS = {"int8": (8, -1), "int4": (4, 128), "int2": (2, 64)}
NF4 = "nf4"
_ALIASES = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q3_K": "Q3_K_M"}


@dataclass(frozen=True, slots=True)
class QatOptions(TrainOptions):
    """to: int8, int4, int2 (a folder), a GGUF type such as Q4_K_M or Q2_K (a GGUF file), or nf4 with lora.

    group_size: inputs per scale of integers, -1: a whole row. symmetric: integers without zero points. teacher: whose
    words are learned; None: the model itself before it is quantised. alpha, temperature, top_k, cache: as in
    DistilOptions. imatrix: which inputs matter, for where scales start; None: measured on the training text.
    scale_rate: what the learning rate is multiplied by for the logarithms of scales. tensor: REGEX=TYPE, other types
    for some tensors of a GGUF file. lora: train low-rank factors beside an NF4 base instead of its weights, and either
    `merge` them in the end or write them as an `adapter`; rank, lora_alpha: of them.
    """

    to: str = "int4"
    group_size: int | None = None
    symmetric: bool = True
    teacher: Path | None = None
    alpha: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    cache: Path | None = None
    imatrix: Path | None = None
    scale_rate: float = 20.0
    tensor: tuple[str, ...] = ()
    lora: Literal["merge", "adapter"] | None = None
    rank: int = 8
    lora_alpha: float = 16.0

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        known = (*INTEGERS, *trainable_mixes(), NF4)
        if self.to.lower() not in (*INTEGERS, NF4) and self.mix is None:
            raise ConfigError(f"to is {self.to!r}, which cannot be trained: {nearest(self.to, known)}")
        self._check_lora()
        self._check_grid()
        for name, low, high in (("alpha", 0.0, 1.0), ("temperature", 0.05, 100.0), ("scale_rate", 0.0, 1e6)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be from {low:g} to {high:g}, not {getattr(self, name):g}")
        if self.top_k is not None and not 1 <= self.top_k <= 4096:
            raise ConfigError(f"top_k must be 1 to 4096, not {self.top_k}")
        if self.cache is not None and self.top_k is None:
            raise ConfigError("cache keeps the teacher's top_k tokens: give top_k too")

    def _check_lora(self) -> None:
        if (self.to.lower() == NF4) != (self.lora is not None):
            raise ConfigError("nf4 and lora go together: factors are trained beside a base of NF4, and only there")
        if not 1 <= self.rank <= 1024:
            raise ConfigError(f"rank must be 1 to 1024, not {self.rank}")
        if not 0 < self.lora_alpha <= 1e6:
            raise ConfigError(f"lora_alpha must be above 0 and up to 1e6, not {self.lora_alpha:g}")

    def _check_grid(self) -> None:
        is_integer = self.to.lower() in INTEGERS
        size = self.group_size
        if size is not None and not (size == -1 or (16 <= size <= 1 << 16 and size & (size - 1) == 0)):
            raise ConfigError(f"group_size must be -1 (whole rows) or a power of two from 16, not {size}")
        if not is_integer and (size is not None or not self.symmetric):
            raise ConfigError(f"group_size and asymmetric are of integers: {self.to} has its own groups")
        if self.tensor and self.mix is None:
            raise ConfigError(f"tensor gives tensors of a GGUF file other types, and {self.to} writes a folder")

    @property
    def mix(self) -> Mix | None:
        """Of a GGUF type; None for others."""
        name = self.to.upper()
        found = MIXES.get(_ALIASES.get(name, name))
        return found if found is not None and found.name in trainable_mixes() else None


def trainable_mixes() -> tuple[str, ...]:
    """GGUF types all of whose blocks can be trained."""
    return tuple(name for name, mix in MIXES.items() if mix.default in LAYOUTS)
