"""Plans a GGUF file and writes it: shared by quantising and converting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nybble import _native
from nybble.compress.gguf.imatrix import ImportanceMatrix
from nybble.compress.gguf.source import Source, SourceTensor
from nybble.compress.methods import Progress, QuantizeReport
from nybble.core.errors import CheckpointError, ConfigError
from nybble.formats.gguf_writer import GgufWriter, TensorInfo, Value, encode_value, file_bytes
from nybble.formats.output import OutputFile, refuse_existing
from nybble.quant.formats import QuantFormat

_QUANTIZATION_VERSION = 2  # of the block layouts
_DECODABLE = frozenset(
    (
        *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
    )
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is decided before the first byte is written."""

    source: Source
    keys: Mapping[str, bytes]
    targets: list[TensorInfo]  # of source.tensors, one for one
    report: QuantizeReport


def check_target(source: Path, target: Path, *, force: bool) -> None:
    """Raises OutputError if something is there that may not be replaced, ConfigError if it is the source."""
    refuse_existing(target, force=force)
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"{target} is the model itself: write to another name")


def make_plan(
    source: Source, formats: Sequence[QuantFormat], file_type: int, extra: Mapping[str, Value], notes: Sequence[str]
) -> Plan:
    """formats: of source.tensors, one for one. Raises CheckpointError for a tensor that cannot be decoded."""
    last: dict[str, Value] = {"general.quantization_version": _QUANTIZATION_VERSION, "general.file_type": file_type}
    last |= extra
    keys = {key: value for key, value in source.keys.items() if key not in last}
    keys |= {key: encode_value(value) for key, value in last.items()}
    targets = []
    by_type: dict[str, tuple[int, int]] = {}
    peak = 0
    for tensor, fmt in zip(source.tensors, formats, strict=True):
        before = tensor.info
        if before.format is not fmt and before.format.name not in _DECODABLE:
            raise CheckpointError(
                f"{source.path}: the tensor {before.name!r} is encoded as {before.format.name}, which cannot be "
                "quantised again: start from the full-precision model"
            )
        info = TensorInfo(before.name, before.shape, fmt)
        targets.append(info)
        count, size = by_type.get(fmt.name, (0, 0))
        by_type[fmt.name] = count + 1, size + info.num_bytes
        peak = max(peak, info.num_bytes + before.num_bytes)
    report = QuantizeReport(
        source_bytes=source.file_bytes,
        target_bytes=file_bytes(keys, targets),
        num_weights=sum(info.num_weights for info in targets),
        by_type=by_type,
        notes=(*source.notes, *notes),
        peak_bytes=peak,
    )
    return Plan(source, keys, targets, report)


def write(
    plan: Plan,
    target: Path,
    progress: Progress,
    *,
    imatrix: ImportanceMatrix | None = None,
    threads: int | None = None,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Tensor by tensor. Raises OutputError, or CheckpointError for a NaN.

    check: called with the complete file before it gets its name; if it raises, the file is not written.
    """
    encoder = _native.Encoder(threads=threads)
    progress.start(plan.report.num_weights)
    with OutputFile(target, force=force) as file:
        writer = GgufWriter(file, plan.keys, plan.targets)
        for tensor, info in zip(plan.source.tensors, plan.targets, strict=True):
            if tensor.info.format is info.format:
                writer.write(info, tensor.read())
            else:
                weights = None if imatrix is None else imatrix.weights(info.name, info.shape[-1])
                writer.write(info, encode(encoder, tensor, info, weights, plan.source.path))
            tensor.release()
            progress.advance(info.num_weights, f"{info.name} {info.format.name}")
        writer.finish()
        if check is not None:
            check(file.part)


def encode(
    encoder: _native.Encoder,
    tensor: SourceTensor,
    info: TensorInfo,
    weights: npt.NDArray[np.float32] | None,
    path: Path,
) -> npt.NDArray[np.uint8]:
    """A tensor in the type of `info`. Raises CheckpointError that names the tensor and the row of a NaN."""
    out = np.empty(info.num_bytes, np.uint8)
    columns = info.shape[-1]
    bad = encoder.encode_into(
        to=info.format.name,
        source_format=tensor.info.format.name,
        source=tensor.read(),
        rows=info.num_weights // columns,
        cols=columns,
        out=out,
        importance=weights,
    )
    if bad >= 0:
        raise CheckpointError(
            f"{path}: row {bad} of the tensor {info.name!r} has a NaN, an infinity or a weight too large for "
            f"{info.format.name}: the model is damaged, or needs BF16"
        )
    return out
