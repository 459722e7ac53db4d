"""The pass that rounds each weight to the nearest point of a grid, and writes compressed-tensors folders.

Integers of 2 to 8 bits per row or group, 8-bit floats per row, or plain 16-bit floats. Where E[x^2] of each input is
known, from calibration text or an importance matrix, ranges are clipped where that makes the weighted error least.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from nybble.backends.torch import TorchDecoder
from nybble.compress.calibration.samples import Calibration, load_calibration
from nybble.compress.calibration.stream import Stream, batch_bytes, quiet_inputs
from nybble.compress.gguf.imatrix import ImportanceMatrix, read_imatrix
from nybble.compress.grids import Grid, round_to_nearest
from nybble.compress.methods import Progress, QuantizeReport, QuantizeRequest
from nybble.compress.rtn.config import compressed_config
from nybble.compress.rtn.float8 import quantize_float8
from nybble.compress.safetensors.linear import TORCH_DTYPES, empty_grouped, grouped, largest_layer_bytes, put, take
from nybble.compress.safetensors.model import Floats, FolderModel, Module
from nybble.compress.safetensors.options import CALIBRATION, Options, fitting_group, sample_tokens
from nybble.compress.safetensors.run import LayerResult, assigned, quantize_folder
from nybble.compress.safetensors.timing import forward_seconds, rounding_seconds
from nybble.core.errors import ConfigError
from nybble.families.common import GGUF_NAMES
from nybble.formats.dialects.compressed import write_float8, write_packed
from nybble.formats.stored import Stored, floats_as
from nybble.quant.weights import Float8

# Type -> bits and inputs per scale.
INTEGERS = {"int8": (8, -1), "int4": (4, 128), "int3": (3, 128), "int2": (2, 64)}
_FLOATS = {"fp16": "F16", "bf16": "BF16"}
TYPES = (*INTEGERS, "fp8", *_FLOATS)
_BLIND = (
    "a clip search that knows nothing of the inputs usually costs more than it gains: give --calibrate or --imatrix"
)
_OPTIONS = ("group_size", "symmetric", "clip_search", "imatrix", "report", *CALIBRATION)


def quantize(request: QuantizeRequest, progress: Progress) -> QuantizeReport:
    """Raises as `quantize_folder`."""
    integers = request.method.name in INTEGERS
    options = Options.of(request, _OPTIONS if integers else ("report",))
    if request.imatrix is not None and any(options.has(name) for name in CALIBRATION):
        raise ConfigError("--imatrix and --calibrate both say which inputs matter: give one of them")
    imatrix = None if request.imatrix is None else read_imatrix(request.imatrix)
    return quantize_folder(request, progress, lambda model: RoundToNearest(model, request, options, imatrix))


class RoundToNearest:
    """A `LayerPass`."""

    def __init__(
        self, model: FolderModel, request: QuantizeRequest, options: Options, imatrix: ImportanceMatrix | None
    ) -> None:
        base = request.method.name
        self.model = model.in_dtype(_FLOATS[base]) if base in _FLOATS else model
        self._options = options
        self._imatrix = imatrix
        modules = list(model.all_modules())
        chosen = assigned(request, modules, TYPES)
        self._types = {module.stem: chosen.get(module.stem, base) for module in modules}
        self._notes: list[str] = []
        widths = sorted({module.inputs for module in modules})
        self._calibrated = any(options.has(name) for name in CALIBRATION)
        self._grids = {name: self._grid(name, widths) for name in INTEGERS if name in self._types.values()}
        self._calibration: Calibration | None = None
        self._stream: Stream | None = None

    def _grid(self, name: str, widths: list[int]) -> Grid:
        bits, group_size = INTEGERS[name]
        size, note = fitting_group(self._options.group_size(group_size), widths)
        if note is not None:
            self._notes.append(note)
        # Of the plain squared error alone the search makes models worse: docs/benchmarks/quality.md.
        weighted = self._calibrated or self._imatrix is not None
        search = self._options.flag("clip_search", bits < 8 and weighted)
        if search and not weighted:
            self._notes.append(_BLIND)
        return Grid(
            bits,
            size,
            self._options.flag("symmetric", True),
            search=search,
            scale_dtype=TORCH_DTYPES[self.model.dtype],
        )

    def plan(self, progress: Progress) -> Mapping[str, object]:
        """As LayerPass.plan."""
        if self._calibrated:
            self._calibration = load_calibration(self.model.checkpoint, self._options, progress)
        return {
            "types": self._types,
            "grids": [str(grid) for grid in self._grids.values()],
            "calibration": None if self._calibration is None else self._calibration.digest,
            "imatrix": None if self._imatrix is None else _digest(self._imatrix),
        }

    def config(self) -> Mapping[str, object] | None:
        """As LayerPass.config."""
        return compressed_config(self._types, self._grids)

    def type_of(self, module: Module) -> str:
        """As LayerPass.type_of."""
        name = self._types[module.stem]
        return _FLOATS.get(name, name)

    def empty(self, module: Module) -> Mapping[str, Stored]:
        """As LayerPass.empty."""
        name = self._types[module.stem]
        if name in _FLOATS:
            return self._plain(module, name, empty=True)
        if name == "fp8":
            codes, scales = np.zeros(module.shape, np.uint8), np.zeros((module.shape[0], 1), np.float32)
            return write_float8(module.stem, Float8(codes, scales), dtype=self.model.dtype)
        return write_packed(module.stem, empty_grouped(module.shape, self._grids[name]), dtype=self.model.dtype)

    def _plain(self, module: Module, name: str, *, empty: bool) -> Mapping[str, Stored]:
        model = self.model.in_dtype(_FLOATS[name])
        return model.empty_module(module) if empty else model.plain_module(module)

    def peak_bytes(self) -> int:
        """As LayerPass.peak_bytes."""
        largest = max(4 * module.num_weights for module in self.model.all_modules())
        if not self._calibrated:
            return 4 * largest
        return (
            4 * largest + largest_layer_bytes(self.model) + batch_bytes(self.model.spec, sample_tokens(self._options))
        )

    @torch.no_grad()
    def seconds(self) -> float:
        """As LayerPass.seconds."""
        name = next((one for one in self._types.values() if one not in _FLOATS), next(iter(self._types.values())))
        size = self._grids[name].group_size if name in self._grids else 128

        def round_one(weight: torch.Tensor) -> object:
            if name in _FLOATS:
                return floats_as(weight.numpy(), _FLOATS[name])
            importance = torch.ones(weight.shape[1]) if self._calibrated or self._imatrix is not None else None
            return _measured(weight, self._rounded("", name, weight, importance)[1], importance, name)

        total = rounding_seconds(self.model, round_one, size)
        return total + (forward_seconds(self.model, self._options, 2.0) if self._calibrated else 0.0)

    def start(self, work: Path, first_layer: int) -> list[str]:
        """As LayerPass.start."""
        notes = list(dict.fromkeys(self._notes))
        if self._calibration is not None:
            decoder = TorchDecoder(self.model.checkpoint, context=self.model.spec.context_length)
            self._stream = Stream(decoder, torch.from_numpy(self._calibration.token_ids))
            self._stream.start(work, first_layer)
            notes.append(self._calibration.coverage())
        return notes

    @torch.no_grad()
    def layer(self, index: int, told: Callable[[Module], None]) -> LayerResult:
        """As LayerPass.layer."""
        stored: dict[str, Stored] = {}
        errors: dict[str, Mapping[str, object]] = {}
        layer = None if self._stream is None else self._stream.layer(index)
        moments = [] if self._stream is None or layer is None else self._stream.collect(index, layer, full=False)
        for module in self.model.modules(index):
            name = self._types[module.stem]
            if name in _FLOATS:
                stored |= self._plain(module, name, empty=False)
                told(module)
                continue
            weight = torch.from_numpy(self.model.read_module(module)) if layer is None else take(layer.weights, module)
            importance = moments[module.group].importance(module.stem) if moments else self._from_imatrix(module)
            tensors, values = self._rounded(module.stem, name, weight, importance)
            stored |= tensors
            if layer is not None:
                put(layer.weights, module, values)
            errors[module.stem] = _measured(weight, values, importance, name)
            told(module)
        if self._stream is not None and layer is not None:
            self._stream.advance(index, layer)
        return LayerResult(stored, errors=errors)

    def _rounded(
        self, stem: str, name: str, weight: torch.Tensor, importance: torch.Tensor | None
    ) -> tuple[Mapping[str, Stored], Floats]:
        """What is stored of a linear, and the values that it means."""
        if name == "fp8":
            float8 = quantize_float8(weight, TORCH_DTYPES[self.model.dtype])
            return write_float8(stem, float8, dtype=self.model.dtype), float8.decode()
        grid = self._grids[name]
        rounded = grouped(stem, *round_to_nearest(weight, grid, importance), grid)
        return write_packed(stem, rounded, dtype=self.model.dtype), rounded.decode()

    def _from_imatrix(self, module: Module) -> torch.Tensor | None:
        if self._imatrix is None:
            return None
        for part in (*module.parts, "attn.qkv"):  # Phi 3's have one name for q, k and v
            name = "blk.{i}.attn_qkv.weight" if part == "attn.qkv" else GGUF_NAMES[part]
            weights = self._imatrix.weights(name.format(i=module.layer), module.inputs)
            if weights is not None:
                return torch.from_numpy(weights)
        raise ConfigError(f"the importance matrix has nothing for {module.stem}: it was made for another model")

    def summary(self, errors: Mapping[str, Mapping[str, object]]) -> list[str]:
        """As LayerPass.summary."""
        quiet = sum(int(str(entry.get("quiet_inputs", 0))) for entry in errors.values())
        return [f"{quiet} inputs of linears carried almost nothing on the calibration text"] if quiet else []

    def scratch(self) -> list[str]:
        """As LayerPass.scratch."""
        return Stream.files()


def _measured(
    weight: torch.Tensor,
    values: Floats,
    importance: torch.Tensor | None,
    name: str,
) -> Mapping[str, object]:
    squares = (weight - torch.from_numpy(values)).square()
    found: dict[str, object] = {"type": name, "relative_error": _share(squares.sum(), weight.square().sum())}
    if importance is not None:
        whole = (weight.square() * importance).sum()
        found["weighted_relative_error"] = _share((squares * importance).sum(), whole)
        found["quiet_inputs"] = quiet_inputs(importance)
    return found


def _digest(imatrix: ImportanceMatrix) -> str:
    found = hashlib.sha256()
    for name in sorted(imatrix.entries):
        found.update(name.encode() + imatrix.entries[name].mean_squares().tobytes())
    return found.hexdigest()


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else 0.0
