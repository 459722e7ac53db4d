"""From the lines of a Modelfile to a manifest: where each file is, and what a model inherits from its parent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nybble.core.errors import ConfigError, ModelNotFoundError, NybbleError, TokenizerError
from nybble.store.blobs import BlobFolder
from nybble.store.layers import adapter_layer, weights_layer
from nybble.store.manifest import Layer, Manifest
from nybble.store.modelfile import Command, Modelfile, ModelfileError
from nybble.store.template import check_template

Quantize = Callable[[Path, Path], None]  # (model file or folder, GGUF file to write)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a Modelfile is built with.

    parent: the canonical name and manifest of a model, fetched if need be. files: name -> digest of what came over the
    network; None if the Modelfile is of this machine and may name its paths.
    """

    blobs: BlobFolder
    parent: Callable[[str], tuple[str, Manifest]]
    base_folder: Path
    files: Mapping[str, str] | None
    progress: Callable[[str], None]

    def build(self, modelfile: Modelfile) -> Manifest:
        """The manifest that a Modelfile asks for.

        Raises:
            ModelfileError: a line names something that is not there or cannot be used.
            ConfigError, StoreError: a file is no model, or cannot be read.
        """
        if modelfile.template is not None:
            self._check_template(modelfile.template)
        base = self._source(modelfile.source)
        adapters = tuple(self._adapter(command) for command in modelfile.adapters)
        parameters = {**base.parameters, **modelfile.parameters}
        if modelfile.draft is not None:
            parameters["speculate"] = f"draft={self._draft(modelfile.draft)}"
        return replace(
            base,
            adapters=adapters or base.adapters,
            template=base.template if modelfile.template is None else modelfile.template.value,
            system=base.system if modelfile.system is None else modelfile.system,
            parameters=parameters,
            messages=modelfile.messages or base.messages,
            license=tuple(dict.fromkeys((*base.license, *modelfile.license))),
        )

    def _source(self, command: Command) -> Manifest:
        layer = self._file(command, weights_layer)
        if layer is not None:
            return Manifest(layer)
        try:
            name, manifest = self.parent(command.value)
        except ModelNotFoundError as error:
            raise _at(command, str(error), "the name of a model, or a file that exists") from error
        self.progress(f"using the files of {name}")
        return replace(manifest, parent=name)

    def _adapter(self, command: Command) -> Layer:
        layer = self._file(command, adapter_layer)
        if layer is None:
            raise _at(command, f"there is no file {command.value!r:.200}", "the path of an adapter")
        return layer

    def _draft(self, command: Command) -> str:
        """A draft model stays where it is, and is looked for when its target is loaded: what to find it by."""
        try:
            path = self.base_folder / Path(command.value).expanduser()
            if self.files is None and path.exists():
                return str(path.absolute())
        except (ValueError, OSError, RuntimeError):
            pass
        if command.value.startswith(("/", "./", "../", "~")):
            raise _at(command, f"there is no file {command.value!r:.200}", "the name of a model, or a path that exists")
        return command.value

    def _file(self, command: Command, take: Callable[[BlobFolder, Path], Layer]) -> Layer | None:
        """The file or folder that a line names; None if there is none, so that it may be a model's name."""
        if self.files is not None:
            digest = self.files.get(command.value)
            if digest is None:
                return None
            if not self.blobs.has(digest):
                raise ConfigError(f"the blob {digest} of {command.value!r:.200} is not here: send it first")
            return take(self.blobs, self.blobs.path(digest))
        try:
            path = self.base_folder / Path(command.value).expanduser()
            if path.exists():
                return take(self.blobs, path)
        except (ValueError, OSError, RuntimeError) as error:  # a NUL in it, too long, no such user
            raise _at(command, f"{command.value!r:.200} cannot be a path ({error})", "a path or a name") from error
        if command.value.startswith(("/", "./", "../", "~")):
            raise _at(command, f"there is no file {str(path)!r:.200}", "a path that exists")
        return None

    def _check_template(self, command: Command) -> None:
        try:
            check_template(command.value)
        except TokenizerError as error:
            raise _at(command, str(error), "a template in Jinja, or in the part of Go's that nybble knows") from error


def _at(command: Command, what: str, expected: str) -> NybbleError:
    return ModelfileError(what, line=command.line, column=command.column, expected=expected)
