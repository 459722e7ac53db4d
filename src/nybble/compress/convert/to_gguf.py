"""From a Hugging Face folder to a GGUF file, without changing a value.

Plain matrices stay what they are. Quantised ones become blocks of a type that means the same values; where there is
none the folder is refused, and `--to hf` with `nybble quantize` after it is the way that costs something.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nybble.checkpoint import Checkpoint, open_checkpoint
from nybble.compress.convert.blocks import gguf_format, to_blocks
from nybble.compress.convert.folder import Folder, open_folder
from nybble.compress.convert.outcome import Conversion, Outcome, Steps
from nybble.compress.convert.proof import Proof, compare, values_of
from nybble.compress.gguf.mixes import MIXES, is_quantised
from nybble.compress.gguf.source import SourceTensor, open_source
from nybble.compress.gguf.write import check_target, make_plan, write
from nybble.compress.methods import Progress
from nybble.core.errors import ConfigError
from nybble.families.common import GGUF_NAMES
from nybble.formats.dialects.logical import Logical
from nybble.formats.gguf_writer import TensorInfo
from nybble.quant.formats import QuantFormat
from nybble.quant.weights import GroupedInt

_PHI3_FUSED = {
    "attn.q": "blk.{i}.attn_qkv.weight", "attn.k": "blk.{i}.attn_qkv.weight", "attn.v": "blk.{i}.attn_qkv.weight",
    "ffn.gate": "blk.{i}.ffn_up.weight", "ffn.up": "blk.{i}.ffn_up.weight",
}  # fmt: skip


def to_gguf(asked: Conversion, progress: Progress) -> Outcome:
    """Vectors become float32, in which every value of a shorter type can be said; matrices stay what they are.

    Raises:
        ConfigError: the source is a GGUF file already, or a quantised matrix has no type in GGUF.
        CheckpointError, TokenizerError, ModelNotFoundError: the folder cannot be read or said in GGUF.
        OutputError: the target exists or cannot be written.
    """
    if asked.source.is_file():
        raise ConfigError(f"{asked.source} is a GGUF file already: nybble quantize changes its types")
    if not asked.dry_run:
        check_target(asked.source, asked.target, force=asked.force)
    folder = open_folder(asked.source)
    checkpoint = open_checkpoint(asked.source)
    source = open_source(asked.source)
    num_weights = sum(int(np.prod(tensor.info.shape)) for tensor in source.tensors)
    steps = Steps(progress, num_weights, 1 if asked.dry_run else 3)
    matrices = _matrices(checkpoint, folder)
    tensors = []
    for tensor in source.tensors:
        matrix = matrices.get(tensor.info.name)
        tensors.append(tensor if matrix is None else matrix.encoded(asked.source))
        steps.advance(tensor.info.num_weights, tensor.info.name)
    source = replace(source, tensors=tensors)
    formats = [tensor.info.format for tensor in tensors]
    commonest = Counter(tensor.info.format.name for tensor in tensors if is_quantised(tensor.info)).most_common(1)
    name = commonest[0][0] if commonest else "F32"
    file_type = next((mix.file_type for mix in MIXES.values() if mix.default == name), 0)
    plan = make_plan(source, formats, file_type, {}, (*folder.notes, *_five_bits(matrices)))
    for note in plan.report.notes:
        progress.note(note)
    if asked.dry_run:
        return Outcome(plan.report, None)
    found: list[Proof] = []

    def prove(path: Path) -> None:
        written = open_checkpoint(path)
        found.append(compare(values_of(checkpoint, folder.packed), values_of(written), steps, str(asked.target)))
        found[0].demand(str(asked.target))

    write(plan, asked.target, steps, force=asked.force, check=prove)
    return Outcome(plan.report, found[0])


@dataclass(slots=True)
class _Matrix:
    """A quantised matrix of the folder as the file will have it. heads: whose rows are interleaved; 0: none."""

    name: str
    logical: Logical
    heads: int
    format: QuantFormat | None = None

    def encoded(self, where: Path) -> SourceTensor:
        """Looks for a type, which needs the values. Raises ConfigError if there is none."""
        weight = self.logical.read()
        if not isinstance(weight, GroupedInt):
            raise ConfigError(
                f"{where}: GGUF has no type for the values of {self.logical.name}, so convert with --to hf, then "
                "quantize"
            )
        try:
            self.format = gguf_format(weight)
        except ValueError as e:
            raise ConfigError(
                f"{where}: {self.logical.name} has no equal in GGUF: {e}; convert with --to hf, then quantize"
            ) from e
        release(self.logical)
        return SourceTensor(TensorInfo(self.name, weight.shape, self.format), self._read, self._release)

    def _read(self) -> memoryview:
        weight = self.logical.read()
        assert isinstance(weight, GroupedInt) and self.format is not None
        rows = to_blocks(weight, self.format)
        if self.heads:
            halves = rows.reshape(self.heads, 2, len(rows) // self.heads // 2, -1)
            rows = np.ascontiguousarray(halves.swapaxes(1, 2))
        return rows.reshape(-1).data

    def _release(self) -> None:
        release(self.logical)


def release(logical: Logical) -> None:
    """Give the pages of a matrix back."""
    for part in logical.parts:
        part.file.release(part.begin, part.end)


def _matrices(checkpoint: Checkpoint, folder: Folder) -> dict[str, _Matrix]:
    """By their names in the file."""
    spec = checkpoint.spec
    found: dict[str, _Matrix] = {}
    for canonical, tensor in checkpoint.tensors.items():
        if tensor.packed is None:
            continue
        layer, inner = "", canonical
        if canonical.startswith("layers."):
            _, layer, inner = canonical.split(".", 2)
        names: Mapping[str, str] = GGUF_NAMES | _PHI3_FUSED if spec.family == "phi3" else GGUF_NAMES
        name = names[inner].format(i=layer)
        heads = 0
        if spec.family == "llama" and layer:
            own = spec.layers[int(layer)]
            heads = {"attn.q": own.num_q_heads, "attn.k": own.num_kv_heads}.get(inner, 0)
        found[name] = _Matrix(name, folder.packed[checkpoint.sources[canonical].name], heads)
    return found


def _five_bits(matrices: Mapping[str, _Matrix]) -> tuple[str, ...]:
    count = sum(matrix.format is not None and matrix.format.name == "Q5_0" for matrix in matrices.values())
    if not count:
        return ()
    return (
        f"{count} matrices are Q5_0: their zero points reach beyond Q4_0, and Q4_1 would have to round their offsets",
    )
