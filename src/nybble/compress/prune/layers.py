"""Layers that are done, each in a file of the working folder: what an interrupted run goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nybble.core.errors import OutputError
from nybble.core.fields import Fields
from nybble.core.spec import LayerSpec
from nybble.formats.safetensors import SafeTensor, read_file, read_json
from nybble.formats.safetensors_writer import Entry, write_json, write_safetensors
from nybble.formats.stored import Stored

_WIDTHS = ("num_q_heads", "num_kv_heads", "ffn_size")
_FLAGS = ("qkv_bias", "out_bias")


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """What has become of a layer.

    source: its index in the model that is pruned. tensors: by the canonical name inside the layer, as a folder stores
    them, with the rows of a folder. figures: what was measured.
    """

    source: int
    spec: LayerSpec
    tensors: Mapping[str, Stored]
    figures: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DoneLayer:
    """A `PrunedLayer` on the disk."""

    source: int
    spec: LayerSpec
    tensors: Mapping[str, SafeTensor]
    figures: Mapping[str, object]


class LayerFiles:
    """In a working folder."""

    def __init__(self, work: Path) -> None:
        self._work = work

    def path(self, index: int) -> Path:
        return self._work / f"layer-{index:04d}.safetensors"

    def num_done(self) -> int:
        """Layers that are complete, counted from the first."""
        count = 0
        while self.path(count).exists():
            count += 1
        return count

    def write(self, index: int, layer: PrunedLayer) -> None:
        """Raises OutputError. The tensors come last: when they have their name, all is there."""
        about: dict[str, object] = {name: getattr(layer.spec, name) for name in (*_WIDTHS, *_FLAGS)}
        about |= {"source": layer.source, "figures": layer.figures}
        write_json(self.path(index).with_suffix(".json"), about)
        entries = [Entry.of(name, stored) for name, stored in layer.tensors.items()]
        write_safetensors(self.path(index), entries, force=True)

    def read(self, index: int, before: tuple[LayerSpec, ...]) -> DoneLayer:
        """before: the layers of the model that is pruned. Raises OutputError if the file is not one of ours."""
        path = self.path(index)
        about = Fields(read_json(path.with_suffix(".json")), str(path))
        source = about.integer("source", low=0)
        if source >= len(before):
            raise OutputError(f"{path} is of another model: remove {self._work} and start again")
        spec = replace(
            before[source],
            num_q_heads=about.integer("num_q_heads"),
            num_kv_heads=about.integer("num_kv_heads"),
            ffn_size=about.integer("ffn_size"),
            qkv_bias=about.flag("qkv_bias"),
            out_bias=about.flag("out_bias"),
        )
        return DoneLayer(
            source, spec, {tensor.name: tensor for tensor in read_file(path)}, about.nested("figures").data
        )

    def files(self, count: int) -> list[Path]:
        """All that `write` made."""
        paths = [self.path(index) for index in range(count)]
        return [*paths, *(path.with_suffix(".json") for path in paths)]
