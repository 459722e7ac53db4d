"""Files that look like models, as far as the store looks."""

from __future__ import annotations

from pathlib import Path


def gguf(folder: Path, name: str = "model.gguf", content: bytes = b"weights") -> Path:
    """A file that begins like a model."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF" + content)
    return path
