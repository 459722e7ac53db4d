"""The registry of TYPEs that `nybble quantize --to` knows, and what every pass takes and gives back.

A pass lives in a module of its own and calls `register` once per TYPE when it is imported; `nybble.compress.table`
imports them all. Nothing here knows how anything is quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from nybble.core.errors import ConfigError

Container = Literal["gguf", "safetensors"]


class Progress(Protocol):
    """Told by a pass how far it is. `total` counts weights, so that time left is even."""

    def start(self, total: int) -> None: ...
    def advance(self, weights: int, what: str) -> None: ...
    def note(self, message: str) -> None: ...


class Silent:
    """A Progress that says nothing."""

    def start(self, total: int) -> None: ...
    def advance(self, weights: int, what: str) -> None: ...
    def note(self, message: str) -> None: ...


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """What a user asked for. An option that a pass does not know must be refused by it, never ignored.

    tensors: regular expression -> type, the first one that is found in a tensor's name wins. options: what only some
    passes know (group_size, calibrate, ...), by the name of the command line option.
    """

    source: Path
    target: Path
    method: Method
    imatrix: Path | None = None
    tensors: tuple[tuple[str, str], ...] = ()
    threads: int | None = None
    force: bool = False
    dry_run: bool = False
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What came out: bytes before and after, per type how many tensors and bytes, and sentences worth reading.

    peak_bytes: predicted by a dry run, 0 where it is not known.
    """

    source_bytes: int
    target_bytes: int
    num_weights: int
    by_type: Mapping[str, tuple[int, int]]
    notes: tuple[str, ...] = ()
    peak_bytes: int = 0

    @property
    def bpw(self) -> float:
        """Bits per weight over the whole file."""
        return 8 * self.target_bytes / self.num_weights if self.num_weights else 0.0


@dataclass(frozen=True, slots=True)
class Method:
    """One TYPE. summary: a few words for the help text."""

    name: str
    container: Container
    summary: str
    run: Callable[[QuantizeRequest, Progress], QuantizeReport]


_METHODS: dict[tuple[str, Container], Method] = {}


def register(method: Method) -> None:
    """Add a TYPE. Raises ValueError if its name is taken in its container."""
    key = (method.name.lower(), method.container)
    if key in _METHODS:
        raise ValueError(f"the type {method.name} is registered twice")
    _METHODS[key] = method


def names() -> list[str]:
    """Every TYPE, in the order of registration."""
    return [method.name for method in _METHODS.values()]


def find(name: str, target: Path | None = None) -> Method:
    """The TYPE of this name, whatever its case. Raises ConfigError that lists what there is.

    target: what will be written; where both containers have the type (BF16, bf16), a name that ends in .gguf decides,
    then how the type is spelled.
    """
    found = [method for (lower, _), method in _METHODS.items() if lower == name.lower()]
    if not found:
        raise ConfigError(f"--to {name} is not a type nybble knows; it knows {', '.join(names())}")
    is_gguf = target is not None and target.suffix.lower() == ".gguf"
    return min(found, key=lambda method: (is_gguf and method.container != "gguf", method.name != name))


def expected_time(seconds: float) -> str:
    """A sentence for people who decide whether to wait."""
    if seconds < 90:
        return f"it would take about {max(1, round(seconds))} s on this machine"
    if seconds < 5400:
        return f"it would take about {round(seconds / 60)} min on this machine"
    return f"it would take about {seconds / 3600:.1f} h on this machine"
