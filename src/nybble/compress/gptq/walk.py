"""The pass that writes GPTQ folders. Frantar et al. 2022, arXiv 2210.17323.

Inside a layer the linears are rounded in the order in which they run, and each reads what those before it give once
they are rounded; the next layer reads what this one has become.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from nybble.backends.torch import Layer, TorchDecoder
from nybble.compress.calibration.groups import walk_groups
from nybble.compress.calibration.samples import Calibration, load_calibration
from nybble.compress.calibration.stream import Moments, Stream, batch_bytes, quiet_inputs
from nybble.compress.gptq.algorithm import GptqOptions, Order, Prepared, gptq, prepare
from nybble.compress.grids import Grid
from nybble.compress.methods import Progress, QuantizeReport, QuantizeRequest
from nybble.compress.safetensors.linear import empty_grouped, grouped, largest_layer_bytes, put, take
from nybble.compress.safetensors.model import FolderModel, Module
from nybble.compress.safetensors.options import CALIBRATION, Options, fitting_group, num_tokens, sample_tokens
from nybble.compress.safetensors.run import LayerResult, quantize_folder, skipped
from nybble.compress.safetensors.timing import (
    forward_seconds,
    hessian_seconds,
    inverse_seconds,
    product_seconds,
    rounding_seconds,
)
from nybble.core.errors import ConfigError
from nybble.formats.dialects.gptq import write_gptq
from nybble.formats.stored import Stored

_GROUP_SIZE = 128
_WHOLE_ROWS = -1  # what scales of groups would add to 8 bits, these do not need
_DAMP = 0.25  # 0.05 fits the text a little closer and other text worse: benchmarks/quality-qwen1.5b.md
_TOKENS_PER_INPUT = 2  # with fewer than one, H is not of full rank, and 4 bits came out worse than rounded to nearest
_OPTIONS = (
    *("group_size", "symmetric", "clip_search", "desc_act", "static_groups", "damp_percent", "report"),
    *CALIBRATION,
)


def quantize(request: QuantizeRequest, progress: Progress) -> QuantizeReport:
    """Raises as `quantize_folder`."""
    options = Options.of(request, _OPTIONS)
    return quantize_folder(request, progress, lambda model: Gptq(model, request, options))


class Gptq:
    """A `LayerPass`."""

    def __init__(self, model: FolderModel, request: QuantizeRequest, options: Options) -> None:
        self.model = model
        self._options = options
        bits = int(request.method.name.removeprefix("gptq-").removesuffix("bit"))
        self._type = request.method.name
        modules = list(model.all_modules())
        self._skipped = skipped(request, modules)
        self._modules = [module for module in modules if module.stem not in self._skipped]
        if not self._modules:
            raise ConfigError("every linear is left out by --tensor: there is nothing to quantise")
        group_size, self._note = fitting_group(
            options.group_size(_WHOLE_ROWS if bits == 8 else _GROUP_SIZE), [m.inputs for m in self._modules]
        )
        for module in self._modules:
            if any(width * bits % 32 for width in module.shape):
                raise ConfigError(
                    f"GPTQ's format packs {bits}-bit codes in words of 32 bits, which {module.stem} of "
                    f"{module.shape[0]} x {module.shape[1]} weights does not fill: use --to int{bits}"
                )
        symmetric = options.flag("symmetric", True)
        grid = Grid(
            bits,
            group_size,
            symmetric,
            search=options.flag("clip_search", True),
            least_zero=0 if symmetric else 1,  # version 1 of the format, which every reader knows, stores it less one
        )
        damp = options.number("damp_percent", _DAMP, low=0.0, high=1.0)
        self._gptq = GptqOptions(grid, _order(options), damp)
        self._calibration: Calibration | None = None
        self._stream: Stream | None = None

    def plan(self, progress: Progress) -> Mapping[str, object]:
        """As LayerPass.plan."""
        self._calibration = load_calibration(self.model.checkpoint, self._options, progress)
        return {"gptq": str(self._gptq), "skipped": sorted(self._skipped), "calibration": self._calibration.digest}

    def config(self) -> Mapping[str, object] | None:
        """As LayerPass.config."""
        grid = self._gptq.grid
        config: dict[str, object] = {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": grid.group_size,
            "desc_act": self._gptq.order is Order.FULL,
            "static_groups": self._gptq.order is Order.STATIC,
            "sym": grid.symmetric,
            "true_sequential": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "damp_percent": self._gptq.damp_percent,
            "meta": {"quantizer": ["nybble"], "order": self._gptq.order.value},
        }
        if self._skipped:
            config["dynamic"] = {f"-:^{stem.replace('.', chr(92) + '.')}$": {} for stem in sorted(self._skipped)}
        return config

    def type_of(self, module: Module) -> str:
        """As LayerPass.type_of."""
        return self.model.dtype if module.stem in self._skipped else self._type

    def empty(self, module: Module) -> Mapping[str, Stored]:
        """As LayerPass.empty."""
        if module.stem in self._skipped:
            return self.model.empty_module(module)
        return write_gptq(module.stem, empty_grouped(module.shape, self._gptq.grid), version=1)

    def peak_bytes(self) -> int:
        """As LayerPass.peak_bytes."""
        widest = max(module.inputs for module in self._modules)
        largest = max(module.num_weights for module in self._modules)
        # The layer; H, its ordered copy, two factors in double precision; a linear with its errors and codes.
        stream = batch_bytes(self.model.spec, sample_tokens(self._options))
        return stream + largest_layer_bytes(self.model) + 4 * widest * widest * 7 + 4 * largest * 6

    @torch.no_grad()
    def seconds(self) -> float:
        """As LayerPass.seconds."""
        shared: dict[int, Prepared] = {}

        def round_one(weight: torch.Tensor) -> object:
            inputs = weight.shape[1]
            if inputs not in shared:
                shared[inputs] = prepare(torch.eye(inputs), self._gptq)
            return gptq(weight, shared[inputs], self._gptq)

        total = rounding_seconds(self.model, round_one, self._gptq.grid.group_size)
        total += product_seconds(self.model, 5.0) + inverse_seconds(self.model, 2.0)
        # Twice through gate and up, once through the rest.
        return total + forward_seconds(self.model, self._options, 1.6) + hessian_seconds(self.model, self._options)

    def start(self, work: Path, first_layer: int) -> list[str]:
        """As LayerPass.start."""
        assert self._calibration is not None
        decoder = TorchDecoder(self.model.checkpoint, context=self.model.spec.context_length)
        self._stream = Stream(decoder, torch.from_numpy(self._calibration.token_ids))
        self._stream.start(work, first_layer)
        notes = [self._calibration.coverage("GPTQ"), *([self._note] if self._note else [])]
        tokens, widest = num_tokens(self._options), max(module.inputs for module in self._modules)
        if tokens < _TOKENS_PER_INPUT * widest:
            notes.append(
                f"{tokens} tokens are few for linears of {widest} inputs: GPTQ may fit the text more than the model; "
                f"take {_TOKENS_PER_INPUT * widest} or more (--calibration-samples)"
            )
        return notes

    @torch.no_grad()
    def layer(self, index: int, told: Callable[[Module], None]) -> LayerResult:
        """As LayerPass.layer."""
        stream = self._stream
        assert stream is not None
        layer = stream.layer(index)
        work = _Rounding(self, layer, self.model.modules(index), told)
        walk_groups(stream, index, layer, work.group, full=True)
        return LayerResult(work.stored, errors=work.errors)

    @property
    def options(self) -> GptqOptions:
        return self._gptq

    def is_skipped(self, module: Module) -> bool:
        return module.stem in self._skipped

    def summary(self, errors: Mapping[str, Mapping[str, object]]) -> list[str]:
        """As LayerPass.summary."""
        notes = []
        ours, theirs = (sum(float(str(e[key])) for e in errors.values()) for key in ("error", "rtn_error"))
        if theirs > 0:
            notes.append(f"the error of all linears' outputs is {ours / theirs:.0%} of round-to-nearest's")
        fallen = [stem for stem, entry in errors.items() if entry["fallback"]]
        if fallen:
            notes.append(f"{len(fallen)} linears were rounded to nearest, which was no worse; the first is {fallen[0]}")
        damped = [stem for stem, entry in errors.items() if entry["damp_percent"] != self._gptq.damp_percent]
        if damped:
            notes.append(f"{len(damped)} linears needed more damping; the first is {damped[0]}")
        quiet = sum(int(str(entry["quiet_inputs"])) for entry in errors.values())
        if quiet:
            notes.append(f"{quiet} inputs of linears carried almost nothing on the calibration text")
        return notes

    def scratch(self) -> list[str]:
        """As LayerPass.scratch."""
        return Stream.files()


def _order(options: Options) -> Order:
    if options.flag("desc_act", False):
        return Order.STATIC if options.flag("static_groups", False) else Order.FULL
    return Order.STATIC if options.flag("static_groups", False) else Order.GROUPS


class _Rounding:
    """What has become of a layer so far."""

    def __init__(self, owner: Gptq, layer: Layer, modules: list[Module], told: Callable[[Module], None]) -> None:
        self._owner = owner
        self._layer = layer
        self._modules = modules
        self._told = told
        self.stored: dict[str, Stored] = {}
        self.errors: dict[str, Mapping[str, object]] = {}

    def group(self, group: int, moments: Moments) -> None:
        """Round the linears that read these inputs."""
        modules = [module for module in self._modules if module.group == group]
        kept = [module for module in modules if self._owner.is_skipped(module)]
        rounded = [module for module in modules if module not in kept]
        for module in kept:
            self.stored |= self._owner.model.plain_module(module)
            self._told(module)
        if not rounded:
            return
        options = self._owner.options
        hessian = moments.hessian(rounded[0].stem)
        shared = prepare(hessian, options)
        for module in rounded:
            found = gptq(take(self._layer.weights, module), shared, options)
            weight = grouped(module.stem, found.codes, found.params, options.grid, found.g_idx)
            self.stored |= write_gptq(module.stem, weight, version=1)
            put(self._layer.weights, module, weight.decode())
            self.errors[module.stem] = {
                "error": found.error,
                "rtn_error": found.rtn_error,
                "damp_percent": found.damp_percent,
                "fallback": found.fallback,
                "quiet_inputs": quiet_inputs(hessian.diagonal()),
            }
            self._told(module)
