"""Texts to calibrate with: a file, a `datasets` name, texts from a program, or what comes with Python itself.

The default is made on the spot: the language reference's topics, docstrings and source of the standard library. That is
English prose and code, it is the same for everybody with the same Python, and nothing has to be fetched.
"""

from __future__ import annotations

import importlib
import importlib.util
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, cast

from nybble.core.errors import ConfigError

DEFAULT_NAME = "Python's documentation and standard library"
OWN_NAME = "text that the model wrote"
SELF = "self"  # how users ask for that
SELF_AFTER = "self:"  # and, with the name of a text behind it, for what the model writes after passages of that
# Modules with much prose in them, and some of plain code; all have been there for many versions.
_MODULES = (
    "argparse", "ast", "asyncio/tasks", "bisect", "calendar", "collections/__init__", "concurrent/futures/_base",
    "configparser", "contextlib", "csv", "dataclasses", "datetime", "decimal", "difflib", "doctest", "email/message",
    "enum", "fractions", "functools", "gettext", "heapq", "html/parser", "http/client", "inspect", "ipaddress",
    "json/encoder", "logging/__init__", "mailbox", "optparse", "pathlib", "pickle", "pickletools", "random", "shutil",
    "socket", "sqlite3/dump", "statistics", "string", "subprocess", "tarfile", "textwrap", "threading", "tokenize",
    "turtle", "typing", "unittest/case", "urllib/parse", "uuid", "zipfile",
)  # fmt: skip
_MAX_DATASET_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class OwnText:
    """Asks for text that this model writes, where it is another than the one that reads it."""

    model: Path


def read_texts(source: object, num_chars: int) -> tuple[list[str], str]:
    """Texts of together about `num_chars` characters where there are as many, and what to call them.

    source: None for the default, a path, the name of a `datasets` data set, or texts.

    Raises ConfigError if there is no such thing, or it cannot be read.
    """
    if source is None:
        return default_texts(), DEFAULT_NAME
    if isinstance(source, list | tuple):
        if not source or not all(isinstance(text, str) for text in source):
            raise ConfigError("texts to calibrate with must be a list of strings, with at least one")
        return list(source), f"{len(source)} given texts"
    path = Path(str(source))
    if path.is_file():
        return [_read_file(path)], path.name
    if path.is_dir() or path.suffix in (".txt", ".md") or importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f"--calibrate {source} is not a file; for the name of a data set the package `datasets` must be installed"
        )
    return _read_dataset(str(source), num_chars), str(source)


def _read_file(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"--calibrate {path} is not a text in UTF-8: byte {e.start} cannot be read") from e
    except OSError as e:
        raise ConfigError(f"--calibrate {path} cannot be read: {e.strerror or e}") from e


def default_texts() -> list[str]:
    """Prose and code in turns."""
    topics = cast("Mapping[str, str]", importlib.import_module("pydoc_data.topics").topics)
    prose = ["\n\n".join(part) for part in _chunked([topics[name] for name in sorted(topics)], 2)]
    library = Path(sysconfig.get_paths()["stdlib"])
    code = []
    for name in _MODULES:
        path = library / f"{name}.py"
        if path.is_file():
            code.append(path.read_text("utf-8", errors="replace"))
    return [text for pair in zip_longest(prose, code) for text in pair if text]


def _chunked(texts: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    for begin in range(0, len(texts), size):
        yield texts[begin : begin + size]


def _read_dataset(name: str, num_chars: int) -> list[str]:
    """The first texts of the first split, from its first column of texts."""
    datasets: Any = importlib.import_module("datasets")
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        texts: list[str] = []
        length = 0
        for row in islice(rows, _MAX_DATASET_ROWS):
            text = row.get("text") or next((value for value in row.values() if isinstance(value, str)), "")
            texts.append(text)
            length += len(text)
            if length >= num_chars:
                break
    except Exception as e:  # the library raises many kinds
        raise ConfigError(f"--calibrate {name}: the data set cannot be loaded: {e}") from e
    if not any(texts):
        raise ConfigError(f"--calibrate {name}: the data set has no column of texts")
    return texts
