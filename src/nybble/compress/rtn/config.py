"""quantization_config of compressed-tensors folders."""

from __future__ import annotations

from collections.abc import Mapping

from nybble.compress.grids import Grid

_UNQUANTISED = ("fp16", "bf16")


def compressed_config(types: Mapping[str, str], grids: Mapping[str, Grid]) -> dict[str, object] | None:
    """types: of each linear by its stem; None if none is quantised.

    One type needs no names: every linear has it but those listed. Several are listed by name.
    """
    used = [name for name in dict.fromkeys(types.values()) if name not in _UNQUANTISED]
    if not used:
        return None
    ignored = ["lm_head", *(stem for stem, name in types.items() if name in _UNQUANTISED)]
    groups: dict[str, object] = {}
    for i, name in enumerate(used):
        members = ["Linear"] if len(used) == 1 else [stem for stem, own in types.items() if own == name]
        groups[f"group_{i}"] = {
            "targets": members,
            "weights": _float8() if name == "fp8" else _integers(grids[name]),
            "input_activations": None,
            "output_activations": None,
            "format": _format(name),
        }
    formats = {_format(name) for name in used}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _format(name: str) -> str:
    return "float-quantized" if name == "fp8" else "pack-quantized"


def _integers(grid: Grid) -> dict[str, object]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size == -1 else "group",
        "group_size": None if grid.group_size == -1 else grid.group_size,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _float8() -> dict[str, object]:
    return _integers(Grid(8, -1)) | {"type": "float"}
