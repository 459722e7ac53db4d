"""Low-rank factors trained beside a base of NF4: QLoRA.

The base keeps its codes in memory, half a byte for each weight, and is decoded a layer at a time, once for the forward
pass and once more for the gradients (Dettmers et al. 2023, arXiv 2305.14314; LoRA: Hu et al. 2021, arXiv 2106.09685).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nybble.backends.torch import Layer, Rope
from nybble.backends.torch.trainable import TrainableDecoder
from nybble.checkpoint import open_checkpoint
from nybble.compress.bnb.algorithm import quantize_4bit
from nybble.compress.distil.run import teacher_of
from nybble.compress.distil.task import DistilTask
from nybble.compress.distil.teacher import shared_vocab
from nybble.compress.methods import Progress
from nybble.compress.qat.options import QatOptions
from nybble.compress.safetensors.model import FolderModel, Module
from nybble.compress.stage import StageResult, partial
from nybble.compress.train.data import Sequences
from nybble.compress.train.group import Group, full
from nybble.compress.train.loop import Trained, Trainer, log_path
from nybble.compress.train.model import open_train_model, write_trained_folder
from nybble.compress.train.setup import identity, keep_log, load_data, stage_result
from nybble.compress.train.state import RunFolder
from nybble.core.errors import ConfigError
from nybble.core.spec import LayerSpec
from nybble.formats.dialects.bnb import write_codebook4
from nybble.formats.output_folder import OutputFolder
from nybble.formats.peft import CONFIG, WEIGHTS
from nybble.formats.safetensors_writer import Entry, write_json, write_safetensors
from nybble.formats.stored import Stored
from nybble.quant.weights import CODEBOOKS, Codebook4

_BLOCK = 64
_UP, _DOWN = "lora_b", "lora_a"


class Nf4Base(nn.Module):
    """Gives a frozen weight, float32 [out, in], decoded from its codes each time."""

    codes: torch.Tensor
    absmax: torch.Tensor
    table: torch.Tensor

    def __init__(self, weight: Codebook4) -> None:
        super().__init__()
        rows, columns = weight.shape
        self._shape = (rows, columns)
        flat = weight.codes.reshape(-1)
        self.register_buffer("codes", torch.from_numpy(flat[0::2] | (flat[1::2] << 4)))
        self.register_buffer("absmax", torch.from_numpy(weight.absmax.copy()))
        self.register_buffer("table", torch.from_numpy(CODEBOOKS[weight.table].copy()))

    def forward(self) -> torch.Tensor:
        """No argument: there is no parameter behind it."""
        codes = torch.stack((self.codes & 15, self.codes >> 4), dim=-1).reshape(-1, _BLOCK)
        return (self.table[codes.int()] * self.absmax[:, None]).reshape(self._shape)


class LoraLayer(Layer):
    """Linears with factors `NAME.lora_a` [rank, in] and `NAME.lora_b` [out, rank] add scale * b (a x)."""

    def __init__(
        self, spec: LayerSpec, weights: Mapping[str, torch.Tensor], *, eps: float, rope: Rope, scale: float
    ) -> None:
        super().__init__(spec, weights, eps=eps, rope=rope)
        self._scale = scale

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = super()._linear(name, x)
        down = self.weights.get(f"{name}.{_DOWN}")
        if down is None:
            return y
        return y + F.linear(F.linear(x, down), self.weights[f"{name}.{_UP}"]) * self._scale


def run_lora(
    src: Path,
    dst: Path,
    options: QatOptions,
    group: Group,
    progress: Progress,
    *,
    resume: bool,
    force: bool,
) -> StageResult:
    """As `run_qat`, for `lora`. dst: a PEFT folder, or a bitsandbytes folder with the factors merged in."""
    return _Lora(src, dst, options, group, progress, force).run(resume)


class _Lora:
    def __init__(
        self, src: Path, dst: Path, options: QatOptions, group: Group, progress: Progress, force: bool
    ) -> None:
        self._force = force
        self._src, self._dst, self._options, self._group, self._progress = src, dst, options, group, progress
        opened = open_train_model(src, dst)
        assert opened.folder is not None
        self._model, self._folder = opened, opened.folder
        self._modules = list(self._folder.all_modules())
        if any(len(module.parts) > 1 for module in self._modules):
            raise ConfigError(f"{src} stores several linears as one, which lora does not train yet: unfuse them first")
        odd = next((module for module in self._modules if module.inputs % _BLOCK), None)
        if odd is not None:
            raise ConfigError(f"{odd.stem} has rows of {odd.inputs} weights, and blocks of NF4 have {_BLOCK}")
        self._scale = options.lora_alpha / options.rank
        self._base: dict[str, Codebook4] = {}

    def run(self, resume: bool) -> StageResult:
        options, group = self._options, self._group
        teacher = open_checkpoint(self._src if options.teacher is None else options.teacher)
        shared_vocab(self._model.checkpoint, teacher)
        data = load_data(teacher, options, group, self._progress)
        if not group.leads:
            trained, model = self._train(data, None)
            self._factors(model)
            return StageResult()
        said = [str(getattr(options, n)) for n in ("teacher", "alpha", "temperature", "top_k", "rank", "lora_alpha")]
        about = identity("lora", self._src, said, options, data, group.size)
        with RunFolder(partial(self._dst), about, resume=resume) as folder:
            trained, model = self._train(data, folder)
            factors = self._factors(model)
            size = self._write_adapter(factors) if options.lora == "adapter" else self._merge(factors)
            log = keep_log(log_path(folder.path), self._dst)
            folder.remove()
        return stage_result(trained, log, {"to": options.to, "lora": str(options.lora), "bytes": size}, ())

    def _train(self, data: Sequences, folder: RunFolder | None) -> tuple[Trained, TrainableDecoder]:
        options, group = self._options, self._group
        model = self._make_model()
        group.shard(model)
        checkpoint = open_checkpoint(self._src if options.teacher is None else options.teacher)
        teacher = None
        if options.alpha > 0:
            teacher = teacher_of(
                checkpoint,
                data,
                folder,
                group,
                self._progress,
                temperature=options.temperature,
                vocab_size=shared_vocab(self._model.checkpoint, checkpoint),
                top_k=options.top_k,
                cache=options.cache,
                bf16=bool(options.bf16),
            )
        task = DistilTask(model, teacher, alpha=options.alpha, temperature=options.temperature)
        return Trainer(task, data, options, folder, group, self._progress).run(), model

    def _make_model(self) -> TrainableDecoder:
        weights: dict[str, torch.Tensor] = {}
        transforms: dict[str, nn.Module] = {}
        generator = torch.Generator().manual_seed(self._options.seed)
        for name, tensor in self._model.checkpoint.tensors.items():
            if not name.startswith("layers.") or len(tensor.shape) != 2:
                weights[name] = torch.from_numpy(self._model.read(name))
                continue
            base = self._codes(name)
            self._base[name] = base
            transforms[name] = Nf4Base(base)
            rows, columns = base.shape
            down = torch.empty(self._options.rank, columns)
            weights[f"{name}.{_DOWN}"] = nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            weights[f"{name}.{_UP}"] = torch.zeros(rows, self._options.rank)
        scale = self._scale

        def make(spec: LayerSpec, weights: Mapping[str, torch.Tensor], eps: float, rope: Rope) -> Layer:
            return LoraLayer(spec, weights, eps=eps, rope=rope, scale=scale)

        model = TrainableDecoder(self._model.checkpoint.spec, weights, transforms=transforms, recompute=True, make=make)
        for name, parameter in model.named_weights():
            parameter.requires_grad_(name.endswith((_UP, _DOWN)))
        return model

    def _codes(self, name: str) -> Codebook4:
        """Those that a quantised folder has, else the weight's."""
        packed = self._model.checkpoint.tensors[name].packed
        if packed is not None:
            weight = packed()
            if isinstance(weight, Codebook4) and weight.table == "nf4" and weight.block == _BLOCK:
                return weight
        return quantize_4bit(torch.from_numpy(self._model.read(name)), "nf4", _BLOCK)

    def _factors(self, model: TrainableDecoder) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        """By canonical name of the linear and the factor's. Every process must come."""
        return {
            name: np.array(full(weight).float().cpu().numpy())
            for name, weight in model.named_weights()
            if name.endswith((_UP, _DOWN))
        }

    def _write_adapter(self, factors: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> int:
        """A PEFT folder. Raises OutputError."""
        entries = []
        for module in self._modules:
            name = f"layers.{module.layer}.{module.parts[0]}"
            for ours, theirs in ((_DOWN, "lora_A"), (_UP, "lora_B")):
                stored = Stored.of(factors[f"{name}.{ours}"])
                entries.append(Entry.of(f"base_model.model.{module.stem}.{theirs}.weight", stored))
        config: dict[str, object] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self._src),
            "r": self._options.rank,
            "lora_alpha": self._options.lora_alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "target_modules": sorted({module.stem.rpartition(".")[2] for module in self._modules}),
        }
        with OutputFolder(self._dst, {"adapter": str(self._src)}, force=self._force) as out:
            write_safetensors(out.work / WEIGHTS, entries, force=True)
            write_json(out.work / CONFIG, config)
            out.commit([])
        return sum(entry.num_bytes for entry in entries)

    def _merge(self, factors: Mapping[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> int:
        """A bitsandbytes folder. Only the linears that have factors are rounded again; all else stays. OutputError."""
        folder: FolderModel = self._folder

        def linear(module: Module) -> Mapping[str, Stored]:
            name = f"layers.{module.layer}.{module.parts[0]}"
            base = self._base[name]
            change = self._scale * (factors[f"{name}.{_UP}"] @ factors[f"{name}.{_DOWN}"])
            if change.any():
                base = quantize_4bit(torch.from_numpy(base.decode() + change), "nf4", _BLOCK)
            return write_codebook4(module.stem, base, dtype=folder.torch_dtype)

        config = {
            "quant_method": "bitsandbytes",
            "load_in_8bit": False,
            "load_in_4bit": True,
            "llm_int8_skip_modules": ["lm_head"],
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": folder.torch_dtype,
            "bnb_4bit_quant_storage": "uint8",
        }
        return write_trained_folder(folder, self._dst, vectors={}, linear=linear, config=config, force=self._force)
