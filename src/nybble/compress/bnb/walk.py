"""The pass that writes bitsandbytes folders: NF4 and FP4 with or without double quantisation, and LLM.int8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch

from nybble.compress.bnb.algorithm import nest_absmax, quantize_4bit, quantize_rows
from nybble.compress.methods import Progress, QuantizeReport, QuantizeRequest
from nybble.compress.safetensors.model import FolderModel, Module
from nybble.compress.safetensors.options import Options
from nybble.compress.safetensors.run import LayerResult, quantize_folder, skipped
from nybble.compress.safetensors.timing import rounding_seconds
from nybble.formats.dialects.bnb import write_codebook4, write_row_int8
from nybble.formats.stored import Stored
from nybble.quant.weights import PackedWeight

_BLOCK = 64
_THRESHOLD = 6.0
_COMPUTE = ("float32", "float16", "bfloat16")


def quantize(request: QuantizeRequest, progress: Progress) -> QuantizeReport:
    """Raises as `quantize_folder`."""
    four = request.method.name != "llm-int8"
    options = Options.of(request, ("double_quant", "compute_dtype", "report") if four else ("threshold", "report"))
    return quantize_folder(request, progress, lambda model: Bitsandbytes(model, request, options))


class Bitsandbytes:
    """A `LayerPass`."""

    def __init__(self, model: FolderModel, request: QuantizeRequest, options: Options) -> None:
        self.model = model
        self._type = request.method.name
        self._double = options.flag("double_quant", False)
        self._compute = options.choice("compute_dtype", model.torch_dtype, _COMPUTE)
        self._threshold = options.number("threshold", _THRESHOLD, low=0.0, high=1e6)
        self._skipped = skipped(request, list(model.all_modules()))

    def plan(self, progress: Progress) -> Mapping[str, object]:
        """As LayerPass.plan."""
        return {
            "double_quant": self._double,
            "compute_dtype": self._compute,
            "threshold": self._threshold,
            "skipped": sorted(self._skipped),
        }

    def config(self) -> Mapping[str, object] | None:
        """As LayerPass.config."""
        eight = self._type == "llm-int8"
        return {
            "quant_method": "bitsandbytes",
            "load_in_8bit": eight,
            "load_in_4bit": not eight,
            "_load_in_8bit": eight,
            "_load_in_4bit": not eight,
            "llm_int8_threshold": self._threshold,
            "llm_int8_skip_modules": ["lm_head", *sorted(self._skipped)],
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "bnb_4bit_quant_type": "fp4" if eight else self._type,
            "bnb_4bit_use_double_quant": self._double,
            "bnb_4bit_compute_dtype": self._compute,
            "bnb_4bit_quant_storage": "uint8",
        }

    def type_of(self, module: Module) -> str:
        """As LayerPass.type_of."""
        return self.model.dtype if module.stem in self._skipped else self._type

    def empty(self, module: Module) -> Mapping[str, Stored]:
        """As LayerPass.empty."""
        if module.stem in self._skipped:
            return self.model.empty_module(module)
        return self._packed(module, torch.zeros(module.shape))[1]

    def _packed(self, module: Module, weight: torch.Tensor) -> tuple[PackedWeight, Mapping[str, Stored]]:
        if self._type == "llm-int8":
            rows = quantize_rows(weight, self._threshold)
            return rows, write_row_int8(module.stem, rows)
        table = cast('Literal["nf4", "fp4"]', self._type)
        found = quantize_4bit(weight, table, _BLOCK)
        nested = nest_absmax(found.absmax) if self._double else None
        return found, write_codebook4(module.stem, found, dtype=self.model.torch_dtype, nested=nested)

    def peak_bytes(self) -> int:
        """As LayerPass.peak_bytes."""
        # Decoded, scaled, bucketed to 64-bit integers, and the codes.
        return 6 * max(4 * module.num_weights for module in self.model.all_modules())

    @torch.no_grad()
    def seconds(self) -> float:
        """As LayerPass.seconds."""
        module = next(self.model.all_modules())
        return rounding_seconds(self.model, lambda weight: self._packed(module, weight))

    def start(self, work: Path, first_layer: int) -> list[str]:
        """As LayerPass.start."""
        return []

    @torch.no_grad()
    def layer(self, index: int, told: Callable[[Module], None]) -> LayerResult:
        """As LayerPass.layer."""
        stored: dict[str, Stored] = {}
        errors: dict[str, Mapping[str, object]] = {}
        for module in self.model.modules(index):
            if module.stem in self._skipped:
                stored |= self.model.plain_module(module)
            else:
                weight = self.model.read_module(module)
                packed, tensors = self._packed(module, torch.from_numpy(weight))
                stored |= tensors
                whole = float(np.square(weight).sum())
                lost = float(np.square(weight - packed.decode()).sum())
                errors[module.stem] = {"type": self._type, "relative_error": lost / whole if whole else 0.0}
            told(module)
        return LayerResult(stored, errors=errors)

    def summary(self, errors: Mapping[str, Mapping[str, object]]) -> list[str]:
        """As LayerPass.summary."""
        return []

    def scratch(self) -> list[str]:
        """As LayerPass.scratch."""
        return []
