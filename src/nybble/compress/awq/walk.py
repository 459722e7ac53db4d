"""The pass that writes AWQ folders. Lin et al. 2023, arXiv 2306.00978.

Inputs that matter get a scale that makes their weights larger before they are rounded; the inverse goes into what gives
those inputs: a norm, the rows of v (for o) or those of up (for down). Every folding leaves the model's function alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from nybble.backends.torch import Layer, TorchDecoder
from nybble.compress.awq.algorithm import ROWS, STEPS, dequantised, search_clip, search_scale
from nybble.compress.calibration.samples import Calibration, load_calibration
from nybble.compress.calibration.stream import Stream, batch_bytes, quiet_inputs
from nybble.compress.gptq.algorithm import output_error
from nybble.compress.grids import Grid, round_to_nearest
from nybble.compress.methods import Progress, QuantizeReport, QuantizeRequest
from nybble.compress.safetensors.linear import empty_grouped, grouped, largest_layer_bytes, put, take
from nybble.compress.safetensors.model import GROUPS, FolderModel, Module
from nybble.compress.safetensors.options import CALIBRATION, Options, fitting_group, sample_tokens
from nybble.compress.safetensors.run import LayerResult, quantize_folder, skipped
from nybble.compress.safetensors.timing import (
    forward_seconds,
    hessian_seconds,
    product_seconds,
    rounding_seconds,
    search_seconds,
)
from nybble.core.errors import ConfigError
from nybble.core.spec import LayerSpec
from nybble.formats.dialects.awq import write_awq
from nybble.formats.stored import Stored, floats_as

_GROUP_SIZE = 128
_UNCLIPPED = ("attn.q", "attn.k")  # small errors in them change which tokens are attended to
# The group of linears -> what gives their inputs.
_NORMS = {0: "attn_norm", 2: "ffn_norm"}


def quantize(request: QuantizeRequest, progress: Progress) -> QuantizeReport:
    """Raises as `quantize_folder`."""
    options = Options.of(request, ("group_size", "symmetric", "clip_search", "report", *CALIBRATION))
    return quantize_folder(request, progress, lambda model: Awq(model, request, options))


class Awq:
    """A `LayerPass`."""

    def __init__(self, model: FolderModel, request: QuantizeRequest, options: Options) -> None:
        self.model = model
        self._options = options
        self._type = request.method.name
        modules = list(model.all_modules())
        self._skipped = skipped(request, modules)
        self._modules = [module for module in modules if module.stem not in self._skipped]
        if not self._modules:
            raise ConfigError("every linear is left out by --tensor: there is nothing to quantise")
        size, self._note = fitting_group(options.group_size(_GROUP_SIZE), [m.inputs for m in self._modules])
        self._grid = Grid(4, size, options.flag("symmetric", False))
        self._clips = options.flag("clip_search", True)
        for module in self._modules:
            if module.shape[0] % 8:
                raise ConfigError(
                    f"AWQ's format packs outputs in eights, which the {module.shape[0]} of {module.stem} are not: use "
                    "--to int4"
                )
        self._calibration: Calibration | None = None
        self._stream: Stream | None = None

    def plan(self, progress: Progress) -> Mapping[str, object]:
        """As LayerPass.plan."""
        self._calibration = load_calibration(self.model.checkpoint, self._options, progress)
        return {
            "grid": str(self._grid),
            "clips": self._clips,
            "skipped": sorted(self._skipped),
            "calibration": self._calibration.digest,
        }

    def config(self) -> Mapping[str, object] | None:
        """As LayerPass.config."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self._grid.group_size,
            "zero_point": True,  # the file has them, in the middle where the grid is symmetric
            "version": "gemm",
            "modules_to_not_convert": ["lm_head", *sorted(self._skipped)],
        }

    def type_of(self, module: Module) -> str:
        """As LayerPass.type_of."""
        return self.model.dtype if module.stem in self._skipped else self._type

    def empty(self, module: Module) -> Mapping[str, Stored]:
        """As LayerPass.empty."""
        if module.stem in self._skipped:
            return self.model.empty_module(module)
        return write_awq(module.stem, empty_grouped(module.shape, self._grid))

    def peak_bytes(self) -> int:
        """As LayerPass.peak_bytes."""
        modules = self.model.modules(0)
        widths = [max(module.inputs for module in modules if module.group == group) for group in range(len(GROUPS))]
        largest = max(module.num_weights for module in self._modules)
        stream = batch_bytes(self.model.spec, sample_tokens(self._options))
        return stream + largest_layer_bytes(self.model) + 4 * sum(width * width for width in widths) + 4 * largest * 6

    @torch.no_grad()
    def seconds(self) -> float:
        """As LayerPass.seconds."""

        def scale(weight: torch.Tensor) -> object:
            hessian = torch.eye(weight.shape[1])
            return search_scale([weight], hessian, torch.ones(len(hessian)), self._grid)

        def round_one(weight: torch.Tensor) -> object:
            clipped = search_clip(weight, torch.eye(weight.shape[1]), self._grid) if self._clips else weight
            return self._error_to_nearest(weight, torch.eye(weight.shape[1])), round_to_nearest(clipped, self._grid)

        total = rounding_seconds(self.model, round_one, self._grid.group_size) + product_seconds(self.model, 4.0)
        total += search_seconds(self.model, scale, ROWS, 2 * STEPS)
        return total + forward_seconds(self.model, self._options, 2.0) + hessian_seconds(self.model, self._options)

    def start(self, work: Path, first_layer: int) -> list[str]:
        """As LayerPass.start."""
        assert self._calibration is not None
        decoder = TorchDecoder(self.model.checkpoint, context=self.model.spec.context_length)
        self._stream = Stream(decoder, torch.from_numpy(self._calibration.token_ids))
        self._stream.start(work, first_layer)
        return [self._calibration.coverage(), *([self._note] if self._note else [])]

    @torch.no_grad()
    def layer(self, index: int, told: Callable[[Module], None]) -> LayerResult:
        """As LayerPass.layer."""
        stream = self._stream
        assert stream is not None
        layer, modules = stream.layer(index), self.model.modules(index)
        moments = stream.collect(index, layer, full=True)
        hessians = [one.hessian(f"layers.{index}.{GROUPS[group][0]}") for group, one in enumerate(moments)]
        plain_errors = {
            module.stem: self._error_to_nearest(take(layer.weights, module), hessians[module.group])
            for module in modules
            if module.stem not in self._skipped
        }
        scales = [
            search_scale(
                [layer.weights[name] for name in names],
                hessians[group],
                moments[group].mean_abs(),
                self._grid,
                share=_sharing(layer.spec) if group == 1 else None,
            ).scale
            for group, names in enumerate(GROUPS)
        ]
        changed = fold(layer, scales)
        stored: dict[str, Stored] = {}
        errors: dict[str, Mapping[str, object]] = {}
        for module in modules:
            scale = scales[module.group]
            hessian = hessians[module.group] / torch.outer(scale, scale)
            weight = take(layer.weights, module)
            if module.stem in self._skipped:
                dtype = self.model.dtype_of(f"layers.{index}.{module.parts[0]}")
                stored[f"{module.stem}.weight"] = floats_as(weight.numpy(), dtype)
                told(module)
                continue
            clipped = self._clipped(layer, module, hessian) if self._clips else weight
            rounded = grouped(module.stem, *round_to_nearest(clipped, self._grid), self._grid)
            values = torch.from_numpy(rounded.decode())
            stored |= write_awq(module.stem, rounded)
            back = _folded_rows(module, scales, layer.spec)
            errors[module.stem] = {
                "error": output_error(weight * back, values * back, hessian),
                "rtn_error": plain_errors[module.stem],
                "quiet_inputs": quiet_inputs(hessians[module.group].diagonal()),
            }
            put(layer.weights, module, values)
            told(module)
        stream.advance(index, layer)
        vectors = {f"layers.{index}.{name}": layer.weights[name].numpy() for name in changed}
        return LayerResult(stored, vectors, errors)

    def _error_to_nearest(self, weight: torch.Tensor, hessian: torch.Tensor) -> float:
        return output_error(weight, dequantised(weight, self._grid), hessian)

    def _clipped(self, layer: Layer, module: Module, hessian: torch.Tensor) -> torch.Tensor:
        parts = [
            layer.weights[name] if name in _UNCLIPPED else search_clip(layer.weights[name], hessian, self._grid)
            for name in module.parts
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def summary(self, errors: Mapping[str, Mapping[str, object]]) -> list[str]:
        """As LayerPass.summary."""
        notes = []
        ours, theirs = (sum(float(str(e[key])) for e in errors.values()) for key in ("error", "rtn_error"))
        if theirs > 0:
            notes.append(f"the error of all linears' outputs is {ours / theirs:.0%} of round-to-nearest's")
        quiet = sum(int(str(entry["quiet_inputs"])) for entry in errors.values())
        if quiet:
            notes.append(f"{quiet} inputs of linears carried almost nothing on the calibration text")
        return notes

    def scratch(self) -> list[str]:
        """As LayerPass.scratch."""
        return Stream.files()


def fold(layer: Layer, scales: list[torch.Tensor]) -> list[str]:
    """Multiply the linears' columns by their scales, and divide what gives their inputs. Gives the vectors' names.

    scales: of each group of GROUPS, [in]; that of o is the same for query heads that share a value head.
    """
    weights, spec = layer.weights, layer.spec
    for names, scale in zip(GROUPS, scales, strict=True):
        for name in names:
            weights[name] = weights[name] * scale
    changed = list(_NORMS.values())
    for group, name in _NORMS.items():
        weights[name] = weights[name] / scales[group]
    of_values = _per_value_row(scales[1], spec)
    weights["attn.v"] = weights["attn.v"] / of_values[:, None]
    if "attn.v.bias" in weights:
        weights["attn.v.bias"] = weights["attn.v.bias"] / of_values
        changed.append("attn.v.bias")
    weights["ffn.up"] = weights["ffn.up"] / scales[3][:, None]
    return changed


def _sharing(spec: LayerSpec) -> Callable[[torch.Tensor], torch.Tensor]:
    def share(scale: torch.Tensor) -> torch.Tensor:
        heads = scale.reshape(spec.num_kv_heads, -1, spec.head_dim)
        return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(-1)

    return share


def _per_value_row(scale: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """From a scale per input of o to one per row of v."""
    return scale.reshape(spec.num_kv_heads, -1, spec.head_dim)[:, 0].reshape(-1)


def _folded_rows(module: Module, scales: list[torch.Tensor], spec: LayerSpec) -> torch.Tensor:
    """[out, 1]: what rows were divided by, so that errors are comparable with those before."""
    parts = []
    for name, rows in zip(module.parts, module.rows, strict=True):
        if name == "attn.v":
            parts.append(_per_value_row(scales[1], spec))
        else:
            parts.append(scales[3] if name == "ffn.up" else torch.ones(rows))
    return torch.cat(parts)[:, None]
