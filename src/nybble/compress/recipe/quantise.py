"""The stage that writes a model in another type: `nybble quantize` inside of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from nybble.compress import table
from nybble.compress.calibration.text import OwnText
from nybble.compress.methods import Method, Progress, QuantizeRequest, find
from nybble.compress.stage import StageResult
from nybble.core.errors import ConfigError

assert table  # imported for what it registers
_OF_REQUEST = ("type", "imatrix", "tensor", "threads")


@dataclass(frozen=True, slots=True)
class QuantiseOptions:
    """As the options of `nybble quantize`. type: Q4_K_M, gptq-4bit, ... tensor: REGEX=TYPE, for some tensors."""

    type: str
    imatrix: Path | None = None
    tensor: tuple[str, ...] = ()
    calibrate: str | OwnText | None = None
    calibration_samples: int | None = None
    calibration_tokens: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    clip_search: bool | None = None
    desc_act: bool | None = None
    damp_percent: float | None = None
    double_quant: bool | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        find(self.type)
        for text in self.tensor:
            if not all(text.rpartition("=")):
                raise ConfigError(f"tensor takes REGEX=TYPE, for example ffn_down=Q6_K, not {text!r}")

    def method(self, target: Path | None = None) -> Method:
        return find(self.type, target)


def run_quantise(
    src: Path, dst: Path, options: QuantiseOptions, *, progress: Progress, resume: bool, force: bool = False
) -> StageResult:
    """Raises as the pass of the type does. It goes on by itself where an interrupted run stopped."""
    values = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in _OF_REQUEST}
    request = QuantizeRequest(
        source=src,
        target=dst,
        method=options.method(dst),
        imatrix=options.imatrix,
        tensors=tuple((left, right) for left, _, right in (text.rpartition("=") for text in options.tensor)),
        threads=options.threads,
        force=force,
        options={name: value for name, value in values.items() if value is not None},
    )
    report = request.method.run(request, progress)
    figures = {
        "type": request.method.name,
        "bytes_before": report.source_bytes,
        "bytes_after": report.target_bytes,
        "bits_per_weight": report.bpw,
    }
    return StageResult(figures, notes=report.notes)
