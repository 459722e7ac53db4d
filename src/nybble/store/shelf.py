"""Finding models by name: those of nybble's store, of Ollama, and of the Hugging Face hub's cache. Changes nothing.

What changes models is in nybble.store.library, which takes longer to import.
"""

from __future__ import annotations

import builtins
import difflib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from nybble.core.env import home
from nybble.core.errors import ModelNotFoundError, StoreError
from nybble.store.blobs import BlobFolder
from nybble.store.catalog import catalog
from nybble.store.hub_files import find_cached, list_cached
from nybble.store.manifest import MAX_BYTES, Layer, StoredModel, parse_manifest
from nybble.store.names import ModelName, from_file_name
from nybble.store.ollama_cache import find_in_ollama, list_ollama


class Shelf:
    """The models below a folder; by default NYBBLE_HOME."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = home() if root is None else root
        self.blobs = BlobFolder(self.root)
        self._folder = self.root / "manifests"

    def list(self) -> list[StoredModel]:
        """Every model, newest first. What is damaged is left out; `verify` tells about it."""
        found = {}
        for name in self._names():
            try:
                found[name] = self._stored(name, *self._read(name))
            except (StoreError, ModelNotFoundError):
                continue
        for model in list_ollama():
            found.setdefault(model.name, model)
        for cached in list_cached():
            found.setdefault(cached.name, _from_hub_cache(cached.name, cached.path))
        return sorted(found.values(), key=lambda model: (-model.modified, str(model.name)))

    def get(self, name: str) -> StoredModel:
        """The model of this name, its files checked to be there and unchanged.

        Raises:
            ModelNotFoundError: there is none.
            StoreError: a file of it is damaged, gone, or was changed since.
        """
        parsed = ModelName.parse(name)
        model = self.find(parsed)
        if model is None:
            raise ModelNotFoundError(self.nothing_called(name))
        return model

    def find(self, name: ModelName) -> StoredModel | None:
        """As `get`, with None for a model that is not here."""
        own = self._own_name(name)
        if own is not None:
            content, modified = self._read(own)
            model = self._stored(own, content, modified)
            for layer in parse_manifest(content, self._folder / own.file_name).layers:
                self._check(own, layer)
            return model
        if (foreign := find_in_ollama(name)) is not None:
            return foreign
        if name.is_on_hub and (cached := find_cached(name)) is not None:
            return _from_hub_cache(name, cached.path)
        return None

    def nothing_called(self, name: str) -> str:
        """The sentence for a name that nothing has: what comes close, and what there is."""
        names = sorted(catalog())
        close = difflib.get_close_matches(name, {*names, *map(str, self._names())}, n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else "."
        return (
            f"no file or folder {name!r:.200}, and no model of that name here or in the catalog{hint} "
            f"It has: {', '.join(names)}"
        )

    def verify(self, progress: Callable[[str], None] = lambda message: None) -> builtins.list[str]:
        """Read every file of the store. Returns a sentence for each thing that is wrong; what is unused is not."""
        wrong = []
        for digest in self.blobs.digests():
            progress(digest)
            if trouble := self.blobs.trouble(digest):
                wrong.append(trouble)
        for file_name in self._file_names():
            name = from_file_name(file_name)
            if name is None:
                wrong.append(f"{self._folder / file_name} is no manifest: remove the file")
                continue
            try:
                content, _ = self._read(name)
                for layer in parse_manifest(content, self._folder / file_name).layers:
                    self._check(name, layer)
            except ModelNotFoundError:
                continue  # removed meanwhile
            except StoreError as error:
                wrong.append(str(error))
        return wrong

    def _file_names(self) -> builtins.list[str]:
        try:
            return sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"{self._folder} cannot be read ({error.strerror}): is NYBBLE_HOME right?") from error

    def _names(self) -> builtins.list[ModelName]:
        return [name for name in map(from_file_name, self._file_names()) if name is not None]

    def _own_name(self, name: ModelName) -> ModelName | None:
        """The name as it was written when the model was made."""
        return next((own for own in self._names() if own == name), None)

    def _read(self, name: ModelName) -> tuple[bytes, float]:
        """A manifest's bytes, and when it was written."""
        path = self._folder / name.file_name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise ModelNotFoundError(f"there is no model {name} here any more") from None
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror})") from error
        with os.fdopen(descriptor, "rb") as file:
            return file.read(MAX_BYTES), os.fstat(descriptor).st_mtime

    def _stored(self, name: ModelName, content: bytes, modified: float) -> StoredModel:
        manifest = parse_manifest(content, self._folder / name.file_name)
        return StoredModel(
            name=name,
            path=self._layer_path(manifest.weights),
            digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
            size=sum(layer.size for layer in manifest.layers),
            modified=modified,
            template=manifest.template,
            system=manifest.system,
            parameters=manifest.parameters,
            messages=manifest.messages,
            license=manifest.license,
            adapters=tuple(self._layer_path(layer) for layer in manifest.adapters),
            parent=manifest.parent,
        )

    def _layer_path(self, layer: Layer) -> Path:
        """Where a file of a model lies."""
        if layer.digest is not None:
            return self.blobs.path(layer.digest)
        assert layer.path is not None
        return Path(layer.path)

    def _check(self, name: ModelName, layer: Layer) -> None:
        """A file must be what it was when the model was made."""
        path = self._layer_path(layer)
        try:
            status = path.lstat() if layer.digest is not None else path.stat()
        except OSError as error:
            raise StoreError(f"{path}, a file of {name}, is gone ({error.strerror}): make the model again") from error
        if layer.path is not None and path.is_dir():
            return
        same = status.st_size == layer.size
        if layer.mtime_ns:
            same = same and (status.st_mtime_ns, status.st_ino) == (layer.mtime_ns, layer.inode)
        if not same or (layer.digest is not None and path.is_symlink()):
            raise StoreError(f"{path}, a file of {name}, was changed since the model was made: make it again")


def _from_hub_cache(name: ModelName, path: Path) -> StoredModel:
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    text = f"{path.resolve()}:{sizes}"
    return StoredModel(
        name=name,
        path=path,
        digest=f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()}",
        size=sum(sizes),
        modified=path.stat().st_mtime,
        origin="huggingface",
    )
