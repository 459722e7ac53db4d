"""What a caller may ask of the choice of tokens, for one request. Plain data: the drawing itself is native.

Field names and meanings are vLLM's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import wraps
from numbers import Real
from typing import Any, TypeVar

from nybble.core.errors import ConfigError

_Class = TypeVar("_Class", bound=type)

MAX_SEED = 2**64 - 1
MAX_LOGPROBS = 100
MAX_SAMPLES = 256

# What other engines have or had, and what to do instead.
_REFUSED = {
    "best_of": "it was dropped upstream: ask for n samples and choose",
    "use_beam_search": "call LLM.beam_search",
    "logits_processors": "use logit_bias, allowed_token_ids, bad_words or structured_outputs",
    "truncate_prompt_tokens": "shorten the prompt before it is given",
    "guided_decoding": "it is called structured_outputs",
    "length_penalty": "it belongs to BeamSearchParams",
    "early_stopping": "it belongs to BeamSearchParams",
    "extra_args": "nybble has no extra arguments",
}


def _refuses_unknown(cls: _Class) -> _Class:
    """A field that does not exist is a ConfigError that says what to use instead, not Python's TypeError."""
    generated = vars(cls)["__init__"]
    known = {field.name for field in fields(cls)}

    @wraps(generated)
    def checked(self: object, *args: object, **values: object) -> None:
        for name in values:
            if name in _REFUSED:
                raise ConfigError(f"{name} is not supported: {_REFUSED[name]}")
            if name not in known:
                raise ConfigError(f"there is no sampling parameter {name!r}")
        generated(self, *args, **values)

    type.__setattr__(cls, "__init__", checked)
    return cls


class RequestOutputKind(IntEnum):
    """What each output of a running request holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # one output, at the end


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What the text must keep to: exactly one of these.

    json: a JSON schema, as text or as an object. grammar: in Lark or GBNF. json_object: any JSON object.

    Raises:
        ConfigError: none or several are set.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]
        if len(given) != 1:
            names = " and ".join(given) or "nothing"
            raise ConfigError(
                f"structured outputs take exactly one of json, regex, choice, grammar and json_object, not {names}"
            )


@_refuses_unknown
@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of a request are chosen and when it ends.

    Raises:
        ConfigError: a value has the wrong type or lies outside the range that its comment gives, or a field does not
            exist here.
    """

    n: int = 1  # samples of the same prompt; sample i draws with seed + i
    presence_penalty: float = 0.0  # -2 to 2: taken off the logits of tokens that were generated
    frequency_penalty: float = 0.0  # -2 to 2: the same, for each time
    repetition_penalty: float = 1.0  # > 0: divides (or multiplies negative) logits of tokens seen, the prompt's too
    temperature: float = 1.0  # >= 0; 0 is greedy: the cuts below then do nothing
    top_p: float = 1.0  # (0, 1]: keep the likeliest tokens until their probabilities reach this sum
    top_k: int = 0  # keep the k likeliest tokens; 0 or -1: all
    min_p: float = 0.0  # [0, 1]: drop tokens less likely than this fraction of the likeliest
    seed: int | None = None  # None: a fresh one for every request
    stop: str | Sequence[str] | None = None  # the text ends before the first of these; becomes a tuple
    stop_token_ids: Sequence[int] | None = None  # the answer ends with one of these; becomes a tuple
    bad_words: Sequence[str] | None = None  # never generated; becomes a tuple
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: until the end of the context
    min_tokens: int = 0  # no end before so many tokens
    logprobs: int | None = None  # how many of the likeliest tokens are reported beside the chosen one
    prompt_logprobs: int | None = None  # the same for each token of the prompt
    detokenize: bool = True  # False: token ids only, no text and no stop strings
    skip_special_tokens: bool = True  # control tokens are not shown in the text
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None  # -100 to 100, added to the logits
    allowed_token_ids: Sequence[int] | None = None  # nothing else is generated; becomes a tuple
    structured_outputs: StructuredOutputsParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        _normalise(self)
        _check_numbers(self)
        stop, words, allowed = self.stop_strings, self.bad_words or (), self.allowed_token_ids
        _require(all(stop), "stop", stop, "made of non-empty strings")
        _require(all(word.strip() for word in words), "bad_words", words, "made of strings that are not blank")
        _require(allowed is None or len(allowed) > 0, "allowed_token_ids", allowed, "None or hold at least one id")
        if stop and not self.detokenize:
            raise ConfigError("stop strings need text: leave detokenize on, or use stop_token_ids")
        if not self.spaces_between_special_tokens:
            raise ConfigError("spaces_between_special_tokens=False is not supported: leave it out")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return self.stop if isinstance(self.stop, tuple) else ()

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < 1e-5


_INTEGERS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")
_NUMBERS = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p",
)  # fmt: skip
_SWITCHES = (
    "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
)  # fmt: skip
_OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}


def _normalise(params: SamplingParams) -> None:
    """Everything gets its type; what may be given in several forms gets one."""

    def put(name: str, change: Callable[[Any], object], expected: str) -> None:
        value = getattr(params, name)
        if value is None and name in _OPTIONAL:
            return
        try:
            object.__setattr__(params, name, change(value))
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{name} must be {expected}, not {value!r:.80}") from None

    for name in _INTEGERS:
        put(name, _integer, "a whole number" + " or None" * (name in _OPTIONAL))
    for name in _NUMBERS:
        put(name, _number, "a number")
    for name in _SWITCHES:
        put(name, _switch, "True or False")
    put("stop", _strings, "a string or a list of strings")
    put("bad_words", lambda words: _strings(words, alone=False), "a list of strings")
    put("stop_token_ids", lambda ids: _ids(ids or ()), "a list of token ids")
    put("allowed_token_ids", lambda ids: None if ids is None else _ids(ids), "a list of token ids or None")
    put("logit_bias", _bias, "a dictionary from token ids to numbers")
    put("output_kind", RequestOutputKind, "a RequestOutputKind")
    put("structured_outputs", _structured, "a StructuredOutputsParams or None")
    if params.top_k == -1:
        object.__setattr__(params, "top_k", 0)


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)  # numpy's integers too


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    return float(value)


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _strings(value: Any, *, alone: bool = True) -> tuple[str, ...]:
    if isinstance(value, str):
        if not alone:
            raise TypeError
        return (value,)
    strings = tuple(value or ())
    if not all(isinstance(string, str) for string in strings):
        raise TypeError
    return strings


def _ids(value: Iterable[Any]) -> tuple[int, ...]:
    return tuple(_integer(token_id) for token_id in value)


def _bias(value: Mapping[Any, Any] | None) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError
    return {_integer(token_id): _number(bias) for token_id, bias in value.items()}


def _structured(value: Any) -> StructuredOutputsParams | None:
    if value is not None and not isinstance(value, StructuredOutputsParams):
        raise TypeError
    return value


def _check_numbers(p: SamplingParams) -> None:
    _require(1 <= p.n <= MAX_SAMPLES, "n", p.n, f"between 1 and {MAX_SAMPLES}")
    _require(-2 <= p.presence_penalty <= 2, "presence_penalty", p.presence_penalty, "between -2 and 2")
    _require(-2 <= p.frequency_penalty <= 2, "frequency_penalty", p.frequency_penalty, "between -2 and 2")
    positive = math.isfinite(p.repetition_penalty) and p.repetition_penalty > 0
    _require(positive, "repetition_penalty", p.repetition_penalty, "above 0")
    _require(math.isfinite(p.temperature) and p.temperature >= 0, "temperature", p.temperature, ">= 0")
    _require(0 < p.top_p <= 1, "top_p", p.top_p, "above 0 and at most 1")
    _require(0 <= p.top_k < 2**31, "top_k", p.top_k, ">= 0 and below 2**31 (0 or -1 keep every token)")
    _require(0 <= p.min_p <= 1, "min_p", p.min_p, "between 0 and 1")
    _require(p.seed is None or 0 <= p.seed <= MAX_SEED, "seed", p.seed, "between 0 and 2**64 - 1")
    _require(p.max_tokens is None or p.max_tokens >= 1, "max_tokens", p.max_tokens, "at least 1")
    longest = p.min_tokens if p.max_tokens is None else p.max_tokens
    _require(0 <= p.min_tokens <= longest, "min_tokens", p.min_tokens, "between 0 and max_tokens")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(p, name)
        expected = f"between 0 and {MAX_LOGPROBS} (the whole vocabulary is too much)"
        _require(value is None or 0 <= value <= MAX_LOGPROBS, name, value, expected)
    for token_id, bias in (p.logit_bias or {}).items():
        _require(-100 <= bias <= 100, f"logit_bias of token {token_id}", bias, "between -100 and 100")


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {expected}, not {value!r}")
