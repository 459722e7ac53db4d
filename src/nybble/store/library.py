"""All models that have a name on this machine: make, find, copy and remove them.

Models of other programs (Ollama, the Hugging Face hub's cache) are found too, read in place, and never touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from nybble.core.errors import ModelNotFoundError, StoreError
from nybble.store.blobs import file_digest, locked, remove_file, sync_folder, write_synced, writing
from nybble.store.create import Quantize, Recipe
from nybble.store.hub import sweep_partial
from nybble.store.layers import reference
from nybble.store.manifest import MAX_BYTES, Layer, Manifest, StoredModel, parse_manifest
from nybble.store.modelfile import parse_modelfile
from nybble.store.names import ModelName
from nybble.store.progress import PullProgress
from nybble.store.pull import fetch_layer
from nybble.store.shelf import Shelf

_TRIES = 3
_KEEP_SECONDS = 3600.0  # a blob that came without a manifest may be waiting for one


class Library(Shelf):
    """The models below a folder; by default NYBBLE_HOME. Safe with several threads and processes at once."""

    def copy(self, source: str, target: str) -> None:
        """Give a model a second name, instead of whatever had that name.

        Raises:
            ModelNotFoundError: there is no such model, or the new name is none that a model can have.
            StoreError: it cannot be written.
        """
        name = ModelName.parse(target)
        self._commit(name, lambda: self._manifest_of(self.get(source)))

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
        recipe = Recipe(self.blobs, self._parent, base_folder, files, progress)

        def make() -> Manifest:
            manifest = recipe.build(modelfile)
            if quantize is not None:
                manifest = self._quantized(manifest, quantize, progress)
            progress("writing manifest")
            return manifest

        self._commit(parsed, make)
        progress("success")
        return self.get(name)

    def pull(self, name: str, progress: Callable[[PullProgress], None]) -> StoredModel:
        """Fetch a model of the catalog or of the Hugging Face hub, or see that it is here already.

        Raises:
            ModelNotFoundError: there is no such model.
            StoreError: it cannot be fetched or stored.
        """
        parsed = ModelName.parse(name)

        def make() -> Manifest:
            layer = fetch_layer(self.blobs, parsed, progress)
            if layer is None:
                raise ModelNotFoundError(self.nothing_called(name))
            progress(PullProgress("writing manifest"))
            return Manifest(layer)

        self._commit(parsed, make)
        progress(PullProgress("success"))
        return self.get(str(parsed))

    def has_blob(self, digest: str) -> bool:
        """Whether a blob is here. Raises ConfigError if the digest is none."""
        return self.blobs.has(digest)

    def write_blob(self, digest: str, chunks: Iterable[bytes]) -> None:
        """Store a blob. Raises ConfigError if the bytes have another digest, StoreError if they cannot be written."""
        self.blobs.write(digest, chunks)

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
                status = path.lstat()
                if digest not in used and time.time() - status.st_ctime > keep_seconds:  # since it got its name
                    freed += status.st_size if status.st_nlink == 1 else 0
                    self.blobs.delete(digest)
                    count += 1
            return count, freed

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

    def _quantized(self, manifest: Manifest, quantize: Quantize, progress: Callable[[str], None]) -> Manifest:
        with self.blobs.workspace() as work:
            with writing(self.root):
                quantize(self._layer_path(manifest.weights), work / "model.gguf")
            progress("hashing the result")
            with writing(self.root):
                digest = f"sha256:{file_digest(work / 'model.gguf')}"
                size = (work / "model.gguf").stat().st_size
            self.blobs.adopt(work / "model.gguf", self.blobs.path(digest))
        return replace(manifest, weights=Layer(size, digest))

    def _commit(self, name: ModelName, make: Callable[[], Manifest]) -> None:
        """Write what `make` returns, and make it again if another process has just removed a file of it."""
        for _ in range(_TRIES):
            manifest = make()
            content = manifest.to_bytes()
            if len(content) > MAX_BYTES:
                raise StoreError(f"the texts of {name} have more than {MAX_BYTES >> 20} MiB together: shorten them")
            with self.blobs.workspace() as work:
                write_synced(self.root, work / "manifest", [content])
                with writing(self.root), locked(self.root):
                    digests = [layer.digest for layer in manifest.layers if layer.digest is not None]
                    if all(map(self.blobs.has, digests)):
                        self._put(name, manifest, work / "manifest")
                        return
        raise StoreError(f"other processes keep removing the files of {name}: try again when they are done")

    def _put(self, name: ModelName, manifest: Manifest, file: Path) -> None:
        for layer in manifest.layers:
            self._check(name, layer)
        self._folder.mkdir(exist_ok=True)
        before = self._own_name(name)
        file.replace(self._folder / name.file_name)
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
