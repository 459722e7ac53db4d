"""Reads LoRA adapters as PEFT saves them: adapter_config.json beside adapter_model.safetensors.

What a config asks for and nybble does not do is refused by name: an adapter that is applied in part is another model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from nybble.core.errors import CheckpointError
from nybble.core.fields import Fields
from nybble.formats.adapter_file import AdapterFile, FactorPair, StoredMatrix, check_pairs, matrix
from nybble.formats.mapping import MappedFile
from nybble.formats.safetensors import read_file, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")

# Keys that say nothing about the arithmetic, or that the tensors themselves answer.
_HARMLESS = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "base_model_class",
    "parent_library", "revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern",
    "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
    "init_lora_weights", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying", "eva_config",
    "loftq_config",
}  # fmt: skip
_OTHERS = {
    "use_dora": "DoRA", "modules_to_save": "whole modules beside the factors", "lora_bias": "biases of the factors",
    "trainable_token_indices": "trained embeddings", "layer_replication": "replicated layers",
    "target_parameters": "parameters that are no modules", "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "use_qalora": "QA-LoRA", "fan_in_fan_out": "transposed weights",
}  # fmt: skip
# With these the base model's own weights were changed when training began.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_peft_adapter(path: Path) -> AdapterFile:
    """Pairs by the path of the module that they change, such as `model.layers.0.self_attn.q_proj`.

    path: the folder, or the safetensors file in it.

    Raises:
        CheckpointError: something is missing, damaged, or of a kind that is not supported.
    """
    weights = _weights(path)
    config_path = weights.parent / CONFIG
    if not config_path.exists():
        raise CheckpointError(
            f"{weights} has no {CONFIG} beside it, so nobody knows its alpha: put it there, or name the PEFT folder"
        )
    fields = Fields(read_json(config_path), str(config_path))
    _check_config(fields)
    scales = _Scales(fields)
    found: dict[str, dict[str, StoredMatrix]] = {}
    tensors = read_file(weights)
    for tensor in tensors:
        match = _FACTOR.fullmatch(tensor.name)
        if match is None:
            raise CheckpointError(f"{weights}: the tensor {tensor.name!r:.120} is {_strange(tensor.name)}")
        both = found.setdefault(match[1], {})
        if match[2].lower() in both:
            raise CheckpointError(f"{weights}: {match[1]!r:.120} has two factors {match[2]}: the file is damaged")
        both[match[2].lower()] = matrix(tensor, tensor.file)
    pairs = {
        name: FactorPair(a, b, scales.of(name, a.shape[0], weights))
        for name, (a, b) in check_pairs(found, weights).items()
    }
    return AdapterFile(path, "peft", None, pairs, (tensors[0].file.view, MappedFile(config_path).view))


def _weights(path: Path) -> Path:
    """The file with the factors. Raises CheckpointError if there is none, or only a pickle."""
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return path / WEIGHTS
        pickle = next((path / f"adapter_model{suffix}" for suffix in _PICKLES), None)
        if pickle is not None and pickle.exists():
            path = pickle
        else:
            raise CheckpointError(f"{path} has no {WEIGHTS}: it is not a PEFT adapter")
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run anything when it is read: save the adapter as safetensors "
            "(save_pretrained does)"
        )
    return path


def _check_config(fields: Fields) -> None:
    kind = fields.text("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{fields.where}: adapters of the type {kind!r:.40} are not supported, only 'LORA'")
    bias = fields.text("bias", "none")
    if bias != "none":
        raise CheckpointError(f"{fields.where}: trained biases (bias: {bias!r:.40}) are not supported, only 'none'")
    init = fields.data.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{fields.where}: init_lora_weights is {init!r:.40}, which changes the base model too: convert the adapter "
            "to a plain LoRA when it is saved (path_initial_model_for_weight_conversion)"
        )
    for key, value in fields.data.items():
        if key in _HARMLESS or not value:
            continue
        raise CheckpointError(f"{fields.where}: {_OTHERS.get(key, 'this setting')} ({key[:60]}) is not supported")


def _strange(name: str) -> str:
    """What a tensor is that is no factor of a linear layer."""
    if "lora_embedding_" in name:
        return "a LoRA of the embedding, which is not supported"
    if "lora_magnitude_vector" in name:
        return "of DoRA, which is not supported"
    if "lora_" in name:
        return "not a factor that nybble knows (lora_A.weight or lora_B.weight)"
    return "not a low-rank factor but a whole weight (modules_to_save, or a bias), which is not supported"


class _Scales:
    """lora_alpha over the rank, or over its root with use_rslora; patterns name modules with values of their own.

    PEFT takes the keys of patterns for regular expressions that must match the end of a module's path. Here they are
    names, anchors allowed: an expression from a file could take for ever.
    """

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self._rank = fields.integer("r", low=1)
        self._alpha = _alpha(fields)
        self._root = fields.flag("use_rslora")
        self._ranks = {_module(key, fields): value for key, value in _pattern(fields, "rank_pattern").items()}
        self._alphas = {_module(key, fields): value for key, value in _pattern(fields, "alpha_pattern").items()}

    def of(self, module: str, rank: int, path: Path) -> float:
        """The scale of a module whose factors have this rank. Raises CheckpointError if the config says another."""
        expected = _find(self._ranks, module, self._rank)
        if rank != expected:
            raise CheckpointError(
                f"{path}: the factors of {module!r:.120} have the rank {rank}, and {self._fields.where} says "
                f"{expected:g}: they do not belong together"
            )
        return _find(self._alphas, module, self._alpha) / (math.sqrt(rank) if self._root else rank)


def _alpha(fields: Fields) -> float:
    return fields.number("lora_alpha", low=-1e6, high=1e6)


def _pattern(fields: Fields, key: str) -> dict[str, float]:
    nested = fields.nested(key)
    return {name: nested.number(name, low=-1e6, high=1e6) for name in nested.data}


def _module(pattern: str, fields: Fields) -> str:
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not re.fullmatch(r"[\w.]+", name):
        raise CheckpointError(
            f"{fields.where}: the pattern {pattern!r:.80} is a regular expression, which is not supported: "
            "write the names of the modules"
        )
    return name


def _find(values: Mapping[str, float], module: str, default: float) -> float:
    return next(
        (value for name, value in values.items() if module == name or module.endswith(f".{name}")),
        default,
    )
