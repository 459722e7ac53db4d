"""Ollama's options: its defaults, what a Modelfile says, what a request says, and what becomes of them here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nybble.serve.errors import ApiError
from nybble.serve.models import DEFAULT, KeepAlive
from nybble.store.modelfile import DEPRECATED, PARAMETERS

# What Ollama draws with if neither the Modelfile nor the request says anything.
DEFAULTS: Mapping[str, Any] = {
    "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0,
    "repeat_last_n": 64, "presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": -1, "num_predict": -1,
    "num_ctx": 0, "stop": (),
}  # fmt: skip
_INTEGERS = frozenset({"top_k", "repeat_last_n", "seed", "num_predict", "num_ctx"})
_MAX_INTEGER = 2**63 - 1
_TINY = 1e-6  # a top_p that keeps one token

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(rf"[+-]?(?:(?:{_PART.pattern})+|\d+\.?\d*|\.\d+)")
_MAX_DURATION_CHARS = 64


@dataclass(frozen=True, slots=True)
class Options:
    """What draws the tokens of one request.

    sampling: fields of SamplingParams. num_predict: the most new tokens, None for as many as fit. num_ctx: the most
    tokens of prompt and answer, None for the engine's context.
    """

    sampling: Mapping[str, Any]
    num_predict: int | None
    num_ctx: int | None


def read_options(stored: Mapping[str, Any], given: Mapping[str, Any] | None, notes: list[str]) -> Options:
    """Options of a request over those of the model over Ollama's defaults.

    notes: gets a sentence for each thing that was asked for and is not done.

    Raises:
        ApiError: 400 that names the option which cannot be used.
    """
    given = {name: value for name, value in (given or {}).items() if value is not None}
    notes += [_without_effect(name) for name in given if name not in DEFAULTS]
    merged = {**DEFAULTS, **stored, **given}
    values = {name: _typed(name, merged[name]) for name in DEFAULTS}
    penalised = values["repeat_penalty"] != 1
    if values["repeat_last_n"] == 0:
        values["repeat_penalty"] = 1.0
    elif penalised and values["repeat_last_n"] > 0:
        notes.append(f"repeat_penalty looks at the whole text, not at the last {values['repeat_last_n']} tokens")
    if values["typical_p"] != 1:
        notes.append("typical_p has no effect: there is no such cut")
    if values["repeat_penalty"] <= 0:
        raise ApiError(400, "the option repeat_penalty must be above 0", param="options.repeat_penalty")
    sampling = {
        "temperature": values["temperature"],
        "top_k": max(values["top_k"], 0),
        "top_p": min(max(values["top_p"], _TINY), 1.0),
        "min_p": values["min_p"],
        "presence_penalty": values["presence_penalty"],
        "frequency_penalty": values["frequency_penalty"],
        "repetition_penalty": values["repeat_penalty"],
        "seed": values["seed"] if values["seed"] >= 0 else None,
        "stop": list(values["stop"]),
    }
    return Options(
        sampling,
        values["num_predict"] if values["num_predict"] > 0 else None,
        values["num_ctx"] if values["num_ctx"] > 0 else None,
    )


def _without_effect(name: str) -> str:
    if name in DEPRECATED:
        return f"the option {name} has no effect: Ollama gave it up"
    if name in PARAMETERS:
        return f"the option {name} has no effect on a request: nybble sets it when a model is loaded, or needs it not"
    return f"there is no option {name!a:.60}: it has no effect"


def _typed(name: str, value: Any) -> Any:
    """The value in the type of its option. JSON of some clients has 40.0 for 40."""
    if name == "stop":
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list | tuple) or not all(isinstance(one, str) for one in stops):
            raise _refused(name, "a string or a list of strings")
        return stops
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused(name, "a number")
    if name not in _INTEGERS:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise _refused(name, "a finite number")
        return number
    if not math.isfinite(value) or int(value) != value or abs(value) > _MAX_INTEGER:
        raise _refused(name, "a whole number of 64 bits")
    return int(value)


def _refused(name: str, expected: str) -> ApiError:
    return ApiError(400, f"the option {name} must be {expected}", param=f"options.{name}")


def keep_alive_of(value: float | str | None) -> KeepAlive:
    """That of a request. Raises ApiError as `keep_alive_seconds` does."""
    return DEFAULT if value is None else keep_alive_seconds(value)


def keep_alive_seconds(value: float | str) -> float:
    """Seconds of a `keep_alive`: a number, or a duration as Go writes it ("5m", "1h30m", "-1"). Negative: for ever.

    Raises:
        ApiError: 400, it is neither.
    """
    if isinstance(value, str):
        text = value.strip()
        if len(text) > _MAX_DURATION_CHARS or not _DURATION.fullmatch(text):
            raise ApiError(400, f"keep_alive {value!a:.80} is not a duration such as 5m or 1h30m", param="keep_alive")
        sign = -1.0 if text.startswith("-") else 1.0
        parts = _PART.findall(text)
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts) if parts else float(text.lstrip("+-"))
        value = sign * seconds
    if not math.isfinite(value):
        raise ApiError(400, "keep_alive must be a finite number of seconds", param="keep_alive")
    return float(value)
