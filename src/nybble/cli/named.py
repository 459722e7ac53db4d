"""A model to talk to, and what its Modelfile says about that if it is one of the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nybble import store
from nybble.cli.options import announce, local_path
from nybble.core.errors import ConfigError, ModelNotFoundError
from nybble.core.sampling import SamplingParams
from nybble.engine.speculation.mode import MAX_DRAFT_TOKENS
from nybble.store import ModelName, StoredModel
from nybble.store.modelfile import Value
from nybble.store.shelf import Shelf

DEFAULTS = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=1024)
# Modelfile's name -> SamplingParams'
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "stop": "stop",
}
LOADING = ("num_ctx", "num_thread", "speculate", "draft_num_predict")
# These would change the text if they were followed.
_MISSING = {"repeat_last_n": "penalties look at the whole text", "typical_p": "there is no such cut"}


@dataclass(frozen=True, slots=True)
class Named:
    """What to load, and how to talk to it. name: as the user wrote it."""

    name: str
    path: Path
    template: str | None = None
    system: str | None = None
    parameters: Mapping[str, Value] = field(default_factory=dict)
    messages: tuple[tuple[str, str], ...] = ()
    adapter: Path | None = None

    def number(self, parameter: str) -> int | None:
        """A whole-number parameter, None where it is not set or 0."""
        value = self.parameters.get(parameter)
        return value if isinstance(value, int) and value > 0 else None


def find_named(model: str) -> Named:
    """A path as it is; a name with what is stored under it, fetched first if need be.

    Raises:
        ModelNotFoundError, StoreError: there is none, or it cannot be fetched.
        ConfigError: the model has several adapters.
    """
    if store.existing(model) is not None:
        return Named(model, local_path(model))
    found = store.stored(model, announce=announce)
    if len(found.adapters) > 1:
        raise ConfigError(
            f"{found.name} has {len(found.adapters)} adapters, and one can be applied at a time: make it again with "
            "one line ADAPTER"
        )
    adapter = next(iter(found.adapters), None)
    return Named(model, found.path, found.template, found.system, found.parameters, found.messages, adapter)


def stored_model(model: str) -> StoredModel | None:
    """The stored model of a name; None for a path, and for a name that is not here."""
    if store.existing(model) is not None:
        return None
    try:
        return Shelf().find(ModelName.parse(model))
    except ModelNotFoundError:
        return None


def sampling(parameters: Mapping[str, Value], given: Mapping[str, object]) -> SamplingParams:
    """How to draw tokens: what the command line gave, else the Modelfile's parameters, else the defaults.

    Raises:
        ConfigError: a value is out of range.
    """
    changes: dict[str, object] = {_SAMPLING[name]: value for name, value in parameters.items() if name in _SAMPLING}
    seed, longest = parameters.get("seed"), parameters.get("num_predict")
    if isinstance(seed, int):
        changes["seed"] = seed if seed >= 0 else None
    if isinstance(longest, int):
        changes["max_tokens"] = longest if longest > 0 else None
    return replace(DEFAULTS, **{**changes, **given})  # type: ignore[arg-type]  # SamplingParams checks them


def speculation(parameters: Mapping[str, Value], given: str | None) -> str:
    """Whether to guess tokens: what the command line gave, else the Modelfile's parameters, else auto."""
    if given is not None:
        return given
    mode, tokens = str(parameters.get("speculate", "auto")), parameters.get("draft_num_predict")
    if mode.startswith("draft=") and ",k=" not in mode and isinstance(tokens, int) and tokens > 0:
        mode += f",k={min(tokens, MAX_DRAFT_TOKENS)}"
    return mode


def not_followed(parameters: Mapping[str, Value]) -> list[str]:
    """Sentences about parameters that would change the text and do not."""
    harmless = {"repeat_last_n": 64, "typical_p": 1}  # what Ollama does without them
    return [
        f"PARAMETER {name} is not followed: {why}"
        for name, why in _MISSING.items()
        if parameters.get(name, harmless[name]) != harmless[name]
    ]


def parameter_lines(parameters: Mapping[str, Value]) -> str:
    """One parameter a line, as a Modelfile has them."""
    return "\n".join(
        f"{name:<24} {one}"
        for name, value in parameters.items()
        for one in (value if isinstance(value, list) else [value])
    )
