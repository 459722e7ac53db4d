"""What to prune, and how: checked as one, so that no option is accepted and then ignored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from nybble.compress.calibration.text import OwnText
from nybble.compress.prune.masks import NM
from nybble.compress.safetensors.options import Options
from nybble.core.errors import ConfigError

Kind = Literal["zeros", "depth", "width"]
_ZEROS = ("method", "amount", "nm")
_WIDTH = ("ffn_width", "heads", "kv_groups")
# Which options go with which kind, besides those that name it.
_SHARED = ("threads",)
_CALIBRATION = ("calibrate", "calibration_samples", "calibration_tokens")
_ALSO: Mapping[Kind, tuple[str, ...]] = {
    "zeros": ("scope", *_CALIBRATION),
    "depth": ("by", *_CALIBRATION),
    "width": ("scope", "compensate", "round_to", *_CALIBRATION),
}


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """One of three kinds.

    Zeros: `method`, with `amount` (the share of each linear that becomes zero) or `nm` ("2:4": so many of so many
    inputs stay). scope "global" (magnitude only) compares the weights of all linears with each other.

    Depth: `drop_layers`, how many, or a share below 1; `by` "influence" takes those that change the residual stream
    least, "loss" one after the other that whose absence costs least on the calibration text.

    Width: shares that stay of the feed-forward neurons (`ffn_width`), of the query heads of each group (`heads`), and
    of the groups, keys and values with their query heads (`kv_groups`). scope "global" lets layers differ. compensate
    "refit" fits what is left to the old outputs, "bias" only keeps their mean (attention only, where the format has
    room for it), "none" does neither. round_to: neurons of a layer are a multiple of it.

    calibrate: a text file, the name of a data set, texts, or `self` for what the model writes; default: Python's own
    documentation. calibration_samples windows of calibration_tokens tokens. threads: to compute with.

    Raises ConfigError for options that do not go together or are out of range.
    """

    method: Literal["magnitude", "wanda", "sparsegpt"] | None = None
    amount: float | None = None
    nm: str | None = None
    scope: Literal["layer", "global"] | None = None
    drop_layers: int | float | None = None
    by: Literal["influence", "loss"] | None = None
    ffn_width: float | None = None
    heads: float | None = None
    kv_groups: float | None = None
    compensate: Literal["refit", "bias", "none"] | None = None
    round_to: int | None = None
    calibrate: str | tuple[str, ...] | OwnText | None = None
    calibration_samples: int | None = None
    calibration_tokens: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        kind = self.kind
        named = {"zeros": _ZEROS, "depth": ("drop_layers",), "width": _WIDTH}[kind]
        allowed = {*named, *_ALSO[kind], *_SHARED}
        for field in fields(self):
            if getattr(self, field.name) is not None and field.name not in allowed:
                raise ConfigError(f"{field.name} does not go with {self._given()[0]}")
        {"zeros": self._check_zeros, "depth": self._check_depth, "width": self._check_width}[kind]()

    @property
    def kind(self) -> Kind:
        given = self._given()
        kinds: list[Kind] = []
        if any(name in _ZEROS for name in given):
            kinds.append("zeros")
        if "drop_layers" in given:
            kinds.append("depth")
        if any(name in _WIDTH for name in given):
            kinds.append("width")
        if not kinds:
            raise ConfigError("there is nothing to prune: give method and amount, drop_layers, ffn_width or heads")
        if len(kinds) > 1:
            raise ConfigError(f"{given[0]} and {given[-1]} do not go together: prune twice, one after the other")
        return kinds[0]

    @property
    def calibrated(self) -> bool:
        return self.method != "magnitude"

    @property
    def pattern(self) -> NM | None:
        return None if self.nm is None else NM.parse(self.nm)

    def calibration(self, samples: int) -> Options:
        """As `load_calibration` takes it. samples: how many if nothing was said."""
        values: dict[str, object] = {name: getattr(self, name) for name in _CALIBRATION}
        if isinstance(self.calibrate, tuple):
            values["calibrate"] = list(self.calibrate)
        values["calibration_samples"] = self.calibration_samples or samples
        return Options("prune", values)

    def given(self) -> dict[str, object]:
        """All that was said."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _given(self) -> list[str]:
        return [name for name in ("drop_layers", *_WIDTH, *_ZEROS) if getattr(self, name) is not None]

    def _check_zeros(self) -> None:
        if self.method is None:
            raise ConfigError(f"{self._given()[0]} needs a method: magnitude, wanda or sparsegpt")
        if (self.amount is None) == (self.nm is None):
            raise ConfigError(f"method {self.method} needs one of amount (like 0.5) and nm (like 2:4)")
        if self.amount is not None and not 0 <= self.amount < 1:
            raise ConfigError(
                f"amount is {self.amount:g}, but must be at least 0 and less than 1: the share that becomes zero"
            )
        NM.parse(self.nm) if self.nm is not None else None
        if self.scope == "global" and (self.method != "magnitude" or self.nm is not None):
            raise ConfigError(
                "scope global compares weights of all linears, which only goes with method magnitude and an amount"
            )
        if not self.calibrated:
            for name in _CALIBRATION:
                if getattr(self, name) is not None:
                    raise ConfigError(f"{name} does not go with method magnitude, which looks at no text")

    def _check_depth(self) -> None:
        count = self.drop_layers
        if count is not None and not (0 < count < 1 or (count >= 1 and count == int(count))):
            raise ConfigError(
                f"drop_layers is {count:g}, but must be a whole number from 1, or a share between 0 and 1"
            )

    def num_dropped(self, num_layers: int) -> int:
        """How many layers go; a share is rounded, to at least one. Raises ConfigError if none would stay."""
        assert self.drop_layers is not None
        count = int(self.drop_layers) if self.drop_layers >= 1 else max(1, round(self.drop_layers * num_layers))
        if count >= num_layers:
            raise ConfigError(
                f"drop_layers is {self.drop_layers:g}, but the model has {num_layers} layers, of which at "
                "least one must stay"
            )
        return count

    def _check_width(self) -> None:
        for name in _WIDTH:
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"{name} is {value:g}, but must be above 0 and up to 1: the share that stays")
        if self.round_to is not None and (self.ffn_width is None or not 1 <= self.round_to <= 4096):
            raise ConfigError(f"round_to is {self.round_to}, but must be from 1 to 4096 and goes with ffn_width")
        if self.compensate == "bias" and self.ffn_width is not None:
            raise ConfigError(
                "compensate bias does not go with ffn_width: the feed-forward part of a layer has no bias to hold it, "
                "so use refit"
            )
