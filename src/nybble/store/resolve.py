"""From what a user typed to a file or folder on this machine."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from nybble.core.errors import ConfigError, ModelNotFoundError, StoreError
from nybble.store.catalog import catalog
from nybble.store.manifest import StoredModel
from nybble.store.names import ModelName
from nybble.store.progress import PullProgress
from nybble.store.shelf import Shelf


def resolve(name_or_path: str | Path, *, announce: Callable[[str], None] = lambda message: None) -> Path:
    """The path of a model: an existing file or folder as it is, a name after fetching the model if need be.

    Args:
        name_or_path: a path, or a name of the store, of the catalog, of Ollama's models or of the hub (hf.co/...).
        announce: told in one line before something slow starts.

    Raises:
        ModelNotFoundError: it is none of them.
        StoreError: the model could not be fetched or stored.
        ConfigError: the model is more than its file, because it has adapters.
    """
    path = existing(name_or_path)
    if path is not None:
        return path
    model = stored(str(name_or_path), announce=announce)
    if model.adapters:
        raise ConfigError(f"{model.name} has an adapter, which cannot be applied here: name the model below it")
    return model.path


def existing(name_or_path: str | Path) -> Path | None:
    """A path that exists; None for anything else."""
    try:
        path = Path(name_or_path).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, no such user
        return None


def stored(name: str, *, announce: Callable[[str], None] = lambda message: None) -> StoredModel:
    """The model of a name, fetched first if it is not here but in the catalog or on the hub.

    Raises:
        ModelNotFoundError: there is none of this name.
        StoreError: it could not be fetched or stored.
    """
    shelf = Shelf()
    try:
        parsed = ModelName.parse(name)
    except ModelNotFoundError:
        raise ModelNotFoundError(shelf.nothing_called(name)) from None
    in_catalog = parsed.key in catalog()
    try:
        model = shelf.find(parsed)
    except StoreError:
        if not in_catalog:
            raise
        model = None  # damaged, and easily had again
    if model is None and (in_catalog or parsed.is_on_hub):
        model = _pull(name, announce)
    if model is None:
        raise ModelNotFoundError(shelf.nothing_called(name))
    return model


def _pull(name: str, announce: Callable[[str], None]) -> StoredModel:
    said = {"success", "writing manifest"}  # nothing slow follows these

    def tell(progress: PullProgress) -> None:
        if progress.total is None and progress.status not in said:
            said.add(progress.status)
            announce(progress.status)

    # To import what downloads takes longer than to find a model that is here.
    library = importlib.import_module("nybble.store.library").Library()
    model: StoredModel = library.pull(name, tell)
    return model
