"""All models that have a name on this machine: make, find, copy and remove them.

Models of other programs (Ollama, the Hugging Face hub's cache) are found too, read in place, and never touched.
"""

from __future__ import annotations

import builtins
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from nybble.core.env import home
from nybble.core.errors import ModelNotFoundError, StoreError
from nybble.store.blobs import BlobFolder, file_digest, locked, remove_file, sync_folder, write_synced, writing
from nybble.store.create import Quantize, Recipe
from nybble.store.hub import sweep_partial
from nybble.store.hub_files import find_cached, list_cached
from nybble.store.layers import reference
from nybble.store.manifest import MAX_BYTES, Layer, Manifest, StoredModel, parse_manifest
from nybble.store.missing import not_found
from nybble.store.modelfile import parse_modelfile
from nybble.store.names import ModelName, from_file_name
from nybble.store.ollama_cache import find_in_ollama, list_ollama
from nybble.store.progress import PullProgress
from nybble.store.pull import fetch_layer

_KEEP_SECONDS = 3600.0  # a blob that came without a manifest may be waiting for one


class Library:
    """The models below a folder; by default NYBBLE_HOME. Safe with several threads and processes at once."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = home() if root is None else root
        self.blobs = BlobFolder(self.root)
        self._folder = self.root / "manifests"

    # --- finding

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
            raise ModelNotFoundError(not_found(name, [str(one) for one in self._names()]))
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

    # --- changing

    def copy(self, source: str, target: str) -> None:
        """Give a model a second name, instead of whatever had that name.

        Raises:
            ModelNotFoundError: there is no such model, or the new name is none that a model can have.
            StoreError: it cannot be written.
        """
        name = ModelName.parse(target)
        model = self.get(source)
        self._commit(name, self._manifest_of(model))

    def remove(self, name: str) -> None:
        """Forget a model, and delete those of its files in the store that no other model uses.

        Raises:
            ModelNotFoundError: there is none.
            StoreError: it belongs to another program, or cannot be removed.
        """
        parsed = ModelName.parse(name)
        with writing(self.root), locked(self.root):
            own = self._own_name(parsed)
            if own is not None:
                self._remove_manifest(own)
                return
        model = self.get(name)
        tool = "`ollama rm`" if model.origin == "ollama" else "`hf cache rm`"
        raise StoreError(f"{model.name} lies in the cache of another program, {model.path}: remove it with {tool}")

    def create(
        self,
        name: str,
        modelfile_text: str,
        *,
        base_folder: Path,
        progress: Callable[[str], None],
        files: Mapping[str, str] | None = None,
        quantize: Quantize | None = None,
    ) -> StoredModel:
        """Make a model from a Modelfile. A file on this machine is linked, not copied and not read through.

        base_folder: where relative paths begin. files: file name -> digest of a blob that is here already; if it is
        given, even empty, the text came over the network and no path of this machine is looked at. quantize: turns
        one model file into another.

        Raises:
            ModelfileError: a line cannot be used.
            ModelNotFoundError: there is no such parent, or no model can have this name.
            ConfigError, StoreError: a file is no model, or the result cannot be written.
        """
        parsed = ModelName.parse(name)
        modelfile = parse_modelfile(modelfile_text)
        for note in modelfile.notes:
            progress(note)
        manifest = Recipe(self.blobs, self._parent, base_folder, files, progress).build(modelfile)
        if quantize is not None:
            manifest = self._quantized(manifest, quantize, progress)
        progress("writing manifest")
        self._commit(parsed, manifest)
        progress("success")
        return self.get(name)

    def pull(self, name: str, progress: Callable[[PullProgress], None]) -> StoredModel:
        """Fetch a model of the catalog or of the Hugging Face hub, or see that it is here already.

        Raises:
            ModelNotFoundError: there is no such model.
            StoreError: it cannot be fetched or stored.
        """
        parsed = ModelName.parse(name)
        layer = fetch_layer(self.blobs, parsed, progress)
        if layer is None:
            raise ModelNotFoundError(not_found(name, ()))
        progress(PullProgress("writing manifest"))
        self._commit(parsed, Manifest(layer))
        progress(PullProgress("success"))
        return self.get(str(parsed))

    def has_blob(self, digest: str) -> bool:
        """Whether a blob is here. Raises ConfigError if the digest is none."""
        return self.blobs.has(digest)

    def write_blob(self, digest: str, chunks: Iterable[bytes]) -> None:
        """Store a blob. Raises ConfigError if the bytes have another digest, StoreError if they cannot be written."""
        self.blobs.write(digest, chunks)

    # --- looking after

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

    def collect(self, *, keep_seconds: float = _KEEP_SECONDS) -> tuple[int, int]:
        """Delete what no model uses: (how many files, their bytes). Blobs younger than `keep_seconds` stay.

        Raises:
            StoreError: a manifest is damaged, so that nobody knows which files it uses.
        """
        with writing(self.root), locked(self.root):
            used = self._used_digests()
            self.blobs.sweep()
            count, freed = 0, sweep_partial(self.root)
            for digest in self.blobs.digests():
                path = self.blobs.path(digest)
                age = time.time() - path.stat().st_mtime
                if digest not in used and (age > keep_seconds or digest.startswith("inode:")):
                    freed += path.stat().st_size if path.stat().st_nlink == 1 else 0
                    self.blobs.delete(digest)
                    count += 1
            return count, freed

    # --- inside

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
            raise ModelNotFoundError(not_found(str(name), ())) from None
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

    def _parent(self, name: str) -> tuple[str, Manifest]:
        model = self.find(ModelName.parse(name)) or self.pull(name, lambda progress: None)
        return str(model.name), self._manifest_of(model)

    def _manifest_of(self, model: StoredModel) -> Manifest:
        if model.origin == "nybble":
            content, _ = self._read(model.name)
            return parse_manifest(content, self._folder / model.name.file_name)
        return Manifest(
            weights=reference(model.path),
            adapters=tuple(reference(path) for path in model.adapters),
            template=model.template,
            system=model.system,
            parameters=model.parameters,
            messages=model.messages,
            license=model.license,
        )

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

    def _quantized(self, manifest: Manifest, quantize: Quantize, progress: Callable[[str], None]) -> Manifest:
        with self.blobs.workspace() as work:
            quantize(self._layer_path(manifest.weights), work / "model.gguf")
            progress("hashing the result")
            digest = f"sha256:{file_digest(work / 'model.gguf')}"
            size = (work / "model.gguf").stat().st_size
            self.blobs.adopt(work / "model.gguf", self.blobs.path(digest))
        return replace(manifest, weights=Layer(size, digest))

    def _commit(self, name: ModelName, manifest: Manifest) -> None:
        """Write a manifest, after a last look at the files that it names."""
        content = manifest.to_bytes()
        if len(content) > MAX_BYTES:
            raise StoreError(f"the texts of {name} have more than {MAX_BYTES >> 20} MiB together: shorten them")
        with self.blobs.workspace() as work:
            write_synced(work / "manifest", [content])
            with locked(self.root):
                for layer in manifest.layers:
                    self._check(name, layer)
                self._folder.mkdir(exist_ok=True)
                before = self._own_name(name)
                (work / "manifest").replace(self._folder / name.file_name)
                if before is not None and before.file_name != name.file_name:  # the same in other letters
                    remove_file(self._folder / before.file_name)
                sync_folder(self._folder)

    def _remove_manifest(self, name: ModelName) -> None:
        try:
            content, _ = self._read(name)
            layers = parse_manifest(content, self._folder / name.file_name).layers
        except StoreError:
            layers = ()
        remove_file(self._folder / name.file_name)
        sync_folder(self._folder)
        try:
            used = self._used_digests()
        except StoreError:
            return  # nobody knows what a damaged manifest uses
        for layer in layers:
            if layer.digest is not None and layer.digest not in used:
                self.blobs.delete(layer.digest)

    def _used_digests(self) -> set[str]:
        used = set()
        for name in self._names():
            content, _ = self._read(name)
            layers = parse_manifest(content, self._folder / name.file_name).layers
            used |= {layer.digest for layer in layers if layer.digest is not None}
        return used


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
