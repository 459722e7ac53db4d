"""A Hugging Face folder as it lies: its ordinary tensors and its quantised matrices, whatever decoder it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nybble.checkpoint import quantisation_config
from nybble.compress.convert.proof import Values, packed_values, plain_values
from nybble.compress.convert.zero_points import examine
from nybble.core.errors import CheckpointError
from nybble.formats.dialects.logical import Logical
from nybble.formats.dialects.read import read_dialect
from nybble.formats.safetensors import SafeTensor, read_folder, read_json

METHODS = ("gptq", "awq", "compressed-tensors", "bitsandbytes")
QUANTISATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Folder:
    """config: config.json without its quantisation, which is apart. kind: `hf` for one that is not quantised.

    order: names of all that will be written, as they lie in the files: of plain tensors and of matrices.
    """

    path: Path
    config: Mapping[str, object]
    quantisation: Mapping[str, object]
    kind: str
    plain: Mapping[str, SafeTensor]
    packed: Mapping[str, Logical]
    order: tuple[str, ...]
    file_bytes: int
    notes: tuple[str, ...] = ()

    def values(self) -> dict[str, Values]:
        """By the names that an unquantised folder has for them."""
        found = {}
        for name in self.order:
            logical = self.packed.get(name)
            if logical is None:
                found[name] = plain_values(self.plain[name])
            else:
                found[name] = packed_values(logical.shape, logical.read)
        return found

    @property
    def num_weights(self) -> int:
        return sum(value.size for value in self.values().values())


def open_folder(path: Path) -> Folder:
    """Raises CheckpointError if the folder is damaged, or quantised in a way that is not supported."""
    config = read_json(path / "config.json")
    tensors, files = read_folder(path)
    quantisation = quantisation_config(config, path)
    bare = {key: value for key, value in config.items() if key not in QUANTISATION_KEYS}
    size = sum(file.size for file in files)
    if not quantisation:
        return Folder(path, bare, {}, "hf", tensors, {}, tuple(tensors), size)
    quantisation, notes = examine(quantisation, tensors, str(path))
    plain, packed = read_dialect(quantisation, tensors, str(path))
    if not packed:
        raise CheckpointError(f"{path} says that it is quantised but has no quantised matrix: get a complete folder")
    kind = str(quantisation.get("quant_method") or "bitsandbytes")
    first = {logical.parts[0].name: name for name, logical in packed.items()}
    order = tuple(first.get(name, name) for name in tensors if name in first or name in plain)
    if _rounds_activations(quantisation):
        notes = (*notes, "the folder says that activations are rounded, too, while it runs: only weights are converted")
    return Folder(path, bare, quantisation, kind, plain, packed, order, size, notes)


def _rounds_activations(quantisation: Mapping[str, object]) -> bool:
    groups = quantisation.get("config_groups")
    entries = groups.values() if isinstance(groups, Mapping) else ()
    rounded = any(isinstance(group, Mapping) and group.get("input_activations") for group in entries)
    return rounded or bool(quantisation.get("kv_cache_scheme"))
