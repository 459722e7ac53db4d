"""quantization_config of the folders that conversions write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_KEPT = ("damp_percent", "static_groups", "true_sequential", "meta", "model_name_or_path")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a matrix asks of a format. scales: the types that hold its scales exactly."""

    bits: int
    shape: tuple[int, int]
    group_size: int
    num_groups: int
    symmetric: bool
    act_order: bool
    lowest_zero: int
    highest_zero: int
    scales: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """What a folder will be. group_size: -1 for whole rows. version: of GPTQ's zero points. left_out: stems of linears
    in layers that are not quantised."""

    kind: str
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    version: int
    scale_dtype: str
    left_out: tuple[str, ...]
    has_head: bool


def describe(target: Target, before: Mapping[str, object]) -> dict[str, object]:
    """before: the source's own, whose remarks a GPTQ folder keeps."""
    ignored = [*(() if target.has_head else ("lm_head",)), *target.left_out]
    if target.kind == "awq":
        return {
            "quant_method": "awq",
            "bits": target.bits,
            "group_size": target.group_size,
            "zero_point": True,  # the layout always has them, in the middle where the grid is symmetric
            "version": "gemm",
            "modules_to_not_convert": ignored,
        }
    if target.kind == "gptq":
        kept = {key: before[key] for key in _KEPT if key in before and before.get("quant_method") == "gptq"}
        config: dict[str, object] = {
            **kept,
            "quant_method": "gptq",
            "bits": target.bits,
            "group_size": target.group_size,
            "desc_act": target.act_order,
            "sym": target.symmetric,
            "lm_head": target.has_head,
            "checkpoint_format": "gptq" if target.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
        }
        if target.left_out:
            config["dynamic"] = {f"-:^{stem.replace('.', chr(92) + '.')}$": {} for stem in target.left_out}
        return config
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": _group(target)},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(target: Target) -> dict[str, object]:
    whole = target.group_size == -1
    weights = {
        "num_bits": target.bits,
        "type": "int",
        "symmetric": target.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else target.group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": "group" if target.act_order else None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
