"""A YAML document whose keys know their lines. Plain data only: no tags, no aliases, numbers as people write them.

YAML 1.1, which PyYAML reads, takes 2:4 for a number of minutes, 1e-5 for a text and `on` for true; here scalars are
what they are in JSON, and texts otherwise.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nybble.core.errors import ConfigError

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 32
_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}


@dataclass(frozen=True, slots=True)
class Mapped:
    """A mapping, and the line of each of its keys."""

    values: dict[str, object]
    lines: dict[str, int]
    line: int


def read_document(path: Path) -> Mapped:
    """The mapping that a file holds; mappings inside are `Mapped` too.

    Raises ConfigError, with the line, for what cannot be read or is not plain data.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_BYTES} bytes: it is not a recipe")
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give a recipe") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not a text in UTF-8: byte {e.start} cannot be read") from e
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror or e}") from e
    return parse_document(text, str(path))


def parse_document(text: str, where: str) -> Mapped:
    """As `read_document`."""
    try:
        yaml: Any = importlib.import_module("yaml")
    except ModuleNotFoundError:
        raise ConfigError("a recipe needs PyYAML: pip install 'nybble[compress]'") from None
    try:
        for token in yaml.scan(text, yaml.SafeLoader):
            if isinstance(token, yaml.AliasToken | yaml.AnchorToken | yaml.TagToken):
                raise ConfigError(
                    f"{where}, line {token.start_mark.line + 1}: anchors, aliases and tags are not read here"
                )
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        place = where if mark is None else f"{where}, line {mark.line + 1}"
        raise ConfigError(f"{place}: this is not YAML: {getattr(e, 'problem', None) or e}") from e
    except RecursionError:
        raise ConfigError(f"{where}: it is nested too deeply to be a recipe") from None
    found = _value(yaml, node, where, 0)
    if not isinstance(found, Mapped):
        raise ConfigError(f"{where}: a recipe is a mapping with the key stages, see docs/compress.md")
    return found


def _value(yaml: Any, node: Any, where: str, depth: int) -> object:
    if node is None:
        return None
    line = node.start_mark.line + 1
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{where}, line {line}: it is nested too deeply to be a recipe")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node.value) if node.style is None else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_value(yaml, one, where, depth + 1) for one in node.value]
    values: dict[str, object] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        at = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{where}, line {at}: a key must be a word")
        key = str(key_node.value)
        if key in values:
            raise ConfigError(f"{where}, line {at}: the key {key!r} is there twice, first in line {lines[key]}")
        values[key] = _value(yaml, value_node, where, depth + 1)
        lines[key] = at
    return Mapped(values, lines, line)


def _scalar(text: str) -> object:
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) < 20 else text
    return float(text) if _FLOAT.fullmatch(text) else text
