"""`nybble list`: the models on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence

from nybble.store import Library, StoredModel

_UNITS = ((86400 * 365, "year"), (86400 * 30, "month"), (86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))
_OWNERS = {"nybble": "", "ollama": "Ollama's", "huggingface": "Hugging Face's"}


def list() -> None:
    """List the models on this machine, newest first: those of nybble, Ollama and the Hugging Face cache."""
    show_table([("NAME", "ID", "SIZE", "MODIFIED", ""), *map(_row, Library().list())])


def show_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows in columns, the first of them the heads."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(model: StoredModel) -> tuple[str, ...]:
    digest = model.digest.removeprefix("sha256:")[:12]
    return str(model.name), digest, size_text(model.size), _ago(time.time() - model.modified), _OWNERS[model.origin]


def size_text(num_bytes: int) -> str:
    """12.3 MB"""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _ago(seconds: float) -> str:
    for length, unit in _UNITS:
        count = int(seconds // length)
        if count > 0:
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "now"
