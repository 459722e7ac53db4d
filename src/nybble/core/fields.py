"""Checked reads of values that come from a file: a wrong type or an absurd number is a CheckpointError at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from nybble.core.errors import CheckpointError

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Fields:
    """A mapping from a file. where: how to name it in errors; prefix: put before every key."""

    data: Mapping[str, object]
    where: str
    prefix: str = ""

    def has(self, key: str) -> bool:
        return self.data.get(self.prefix + key) is not None

    def _get(self, key: str, default: object) -> object:
        value = self.data.get(self.prefix + key)
        if value is None:
            if default is _MISSING:
                raise CheckpointError(f"{self.where}: {self.prefix}{key} is missing, get a complete file")
            return default
        return value

    def _bad(self, key: str, value: object, wanted: str) -> CheckpointError:
        shown = repr(value)[:80]
        return CheckpointError(f"{self.where}: {self.prefix}{key} is {shown}, not {wanted}: the file is damaged")

    def integer(self, key: str, default: object = _MISSING, *, low: int = 1, high: int = 1 << 24) -> int:
        value = self._get(key, default)
        if value is default:
            return cast(int, value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._bad(key, value, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: object = _MISSING, *, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number above `low`."""
        value = self._get(key, default)
        if value is default:
            return cast(float, value)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._bad(key, value, "a number")
        if not low < value <= high:  # false for NaN
            raise self._bad(key, value, f"a number above {low:g} and up to {high:g}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def text(self, key: str, default: object = _MISSING) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._bad(key, value, "a text")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._bad(key, value, "true or false")
        return value

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of positive finite numbers; empty if the key is missing."""
        value = self._get(key, ())
        if not isinstance(value, list | tuple):
            raise self._bad(key, value, "a list of numbers")
        if not all(isinstance(x, int | float) and 0 < x <= 1e12 for x in value):
            raise self._bad(key, value, "a list of positive numbers")
        return tuple(float(x) for x in value)

    def per_layer(self, key: str, layers: int, default: object = _MISSING, *, high: int = 1 << 20) -> list[int]:
        """One whole number per layer, from a list or one number for all."""
        value = self._get(key, default)
        if not isinstance(value, list | tuple):
            return [self.integer(key, default, high=high)] * layers
        good = all(isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= high for x in value)
        if len(value) != layers or not good:
            raise self._bad(key, value, f"{layers} whole numbers from 1 to {high}")
        return list(value)

    def nested(self, key: str) -> Fields:
        """A mapping inside; empty if missing."""
        value = self._get(key, {})
        if not isinstance(value, Mapping):
            raise self._bad(key, value, "an object")
        return Fields(cast("Mapping[str, object]", value), f"{self.where}: {self.prefix}{key}")
