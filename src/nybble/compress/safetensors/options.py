"""The options of passes that write folders: read once, checked, and none of them ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nybble.compress.methods import QuantizeRequest
from nybble.core.errors import ConfigError

# Of the passes that look at activations.
CALIBRATION = ("calibrate", "calibration_samples", "calibration_tokens")
DEFAULT_SAMPLES, DEFAULT_TOKENS = 128, 512


@dataclass(frozen=True, slots=True)
class Options:
    """What a user gave, by the name of the command line option. Reads raise ConfigError for what cannot be used."""

    method: str
    values: Mapping[str, object]

    @classmethod
    def of(cls, request: QuantizeRequest, known: tuple[str, ...]) -> Options:
        """Raises ConfigError if the request has an option that is not known."""
        unknown = [name for name in request.options if name not in known]
        if unknown:
            raise ConfigError(f"--{unknown[0].replace('_', '-')} does not go with --to {request.method.name}")
        if request.imatrix is not None and "imatrix" not in known:
            raise ConfigError(f"--imatrix does not go with --to {request.method.name}")
        return cls(request.method.name, request.options)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def integer(self, name: str, default: int, *, low: int = 1, high: int = 1 << 20) -> int:
        value = self.values.get(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self._bad(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self._bad(name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._bad(name, value, "true or false")
        return value

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.values.get(name)
        if value is None:
            return default
        if value not in choices:
            raise self._bad(name, value, f"one of {', '.join(choices)}")
        return str(value)

    def group_size(self, default: int) -> int:
        """Inputs per scale, -1 for a whole row."""
        value = self.values.get("group_size")
        if value is None:
            return default
        if type(value) is not int or not (value == -1 or (16 <= value <= 1 << 16 and value & (value - 1) == 0)):
            raise self._bad("group_size", value, "-1 (whole rows) or a power of two from 16")
        return value

    def _bad(self, name: str, value: object, wanted: str) -> ConfigError:
        return ConfigError(f"--{name.replace('_', '-')} {value} cannot be used: it must be {wanted}")


def num_tokens(options: Options) -> int:
    """Of all calibration samples. Raises ConfigError."""
    samples = options.integer("calibration_samples", DEFAULT_SAMPLES, high=1 << 16)
    return samples * sample_tokens(options)


def sample_tokens(options: Options) -> int:
    """Of each calibration sample. Raises ConfigError."""
    return options.integer("calibration_tokens", DEFAULT_TOKENS, low=8, high=1 << 16)


def fitting_group(wanted: int, widths: list[int]) -> tuple[int, str | None]:
    """The largest power of two up to `wanted` that divides every width, and a sentence if it is not `wanted`.

    Readers need one size for the whole folder; below 32 they have no kernels, so then a row is one group.
    """
    if wanted == -1 or all(width % wanted == 0 for width in widths):
        return wanted, None
    odd = next(width for width in widths if width % wanted)
    size = wanted
    while size >= min(32, wanted) and any(width % size for width in widths):
        size //= 2
    if size < min(32, wanted):
        return -1, f"rows are one group each instead of groups of {wanted}, which do not divide the width {odd}"
    return size, f"groups have {size} inputs instead of {wanted}, which does not divide the width {odd}"
