"""What the stages of a recipe share: how each is called, what it gives back, and how its options are read.

A stage is a frozen dataclass of options, checked in its `__post_init__`, and a function of the shape of `Run`.
`parse_options` makes the options from the mapping that a recipe or a program has, and refuses what it does not know.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from nybble.compress.methods import Progress
from nybble.core.errors import ConfigError

Options = TypeVar("Options")
_Options = TypeVar("_Options", contravariant=True)


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage leaves behind besides the model.

    figures: plain numbers, texts and lists of them, which the report shows and JSON can hold. log: a file with one JSON
    object per line, if the stage trained. notes: sentences worth reading.
    """

    figures: Mapping[str, object] = field(default_factory=dict)
    log: Path | None = None
    notes: tuple[str, ...] = ()


class Run(Protocol[_Options]):
    """Runs one stage: reads a model at `src` and writes one at `dst`, which appears when it is complete.

    What is needed to go on after an interruption lies in `partial(dst)`; with `resume` it is taken up again if it
    belongs to the same source and options, without it is thrown away. Raises NybbleErrors.
    """

    def __call__(self, src: Path, dst: Path, options: _Options, *, progress: Progress, resume: bool) -> StageResult: ...


def partial(dst: Path) -> Path:
    """Where a stage keeps unfinished work."""
    return dst.with_name(dst.name + ".partial")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A hint for a name that is not known: the nearest one, or all of them if none is near."""
    names = list(known)
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {found[0]!r}?" if found else f"there is {', '.join(names)}"


def parse_options(
    kind: type[Options], values: Mapping[str, object], *, where: str, lines: Mapping[str, int] | None = None
) -> Options:
    """Options of the dataclass `kind` from a mapping.

    where: what the mapping is, for errors. lines: the line of each key, if it comes from a file.

    Raises ConfigError for a key that is not known (with its line and the nearest one that is), a key that is missing, a
    value of another type, and what `kind` itself refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    read: dict[str, Any] = {}
    for key, value in values.items():
        place = _place(where, key, lines)
        if key not in fields:
            raise ConfigError(f"{place}: the key {key!r} is not known, {nearest(str(key), fields)}")
        try:
            read[key] = _convert(hints[key], value)
        except ValueError as e:
            raise ConfigError(f"{place}: {key} is {_shown(value)}, but must be {e}") from None
    for name, one in fields.items():
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and name not in read:
            raise ConfigError(f"{where}: the key {name!r} is missing")
    try:
        return kind(**read)
    except ConfigError as e:
        named = [key for key in values if str(e).startswith(key)]
        raise ConfigError(f"{_place(where, named[0], lines) if named else where}: {e}") from e


def _place(where: str, key: str, lines: Mapping[str, int] | None) -> str:
    return f"{where}, line {lines[key]}" if lines and key in lines else where


def _shown(value: object) -> str:
    return repr(value)[:60]


def _convert(hint: Any, value: object) -> Any:
    """The value as the type `hint`. Raises ValueError that says what it must be."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value)
    if origin is Literal:
        if value not in typing.get_args(hint) or isinstance(value, bool):
            raise ValueError(f"one of {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if origin is tuple:
        element = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise ValueError("a list")
        return tuple(_convert(element, one) for one in value)
    return _convert_plain(hint, value)


def _convert_union(hints: tuple[Any, ...], value: object) -> Any:
    if value is None and type(None) in hints:
        return None
    wanted = []
    for hint in hints:
        if hint is type(None) or dataclasses.is_dataclass(hint):
            continue  # what a program hands in, nobody can write down
        try:
            return _convert(hint, value)
        except ValueError as e:
            wanted.append(str(e))
    raise ValueError(" or ".join(dict.fromkeys(wanted)))


def _convert_plain(hint: Any, value: object) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and is_number and isinstance(value, int):
        return value
    if hint is float and is_number:
        return float(typing.cast("float", value))
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str | Path) and str(value):
        return Path(value)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    if hint not in names:
        raise TypeError(f"an option cannot have the type {hint}")
    raise ValueError(names[hint])
