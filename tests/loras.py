"""Random LoRA adapters for the models of `models.make_tiny`, in both containers, and the same merged into weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from models import gguf_name, interleave

Floats = npt.NDArray[np.float32]
PREFIX = "base_model.model."


def linear_modules(base: Path) -> dict[str, tuple[int, int]]:
    """The linear layers of the decoder's layers, with their shapes."""
    weights = load_file(base / "model.safetensors")
    return {
        name.removesuffix(".weight"): (value.shape[0], value.shape[1])
        for name, value in weights.items()
        if ".layers." in name and value.ndim == 2
    }


def make_lora(
    base: Path,
    folder: Path,
    *,
    rank: int = 4,
    seed: int = 0,
    only: Sequence[str] = (),
    ranks: dict[str, int] | None = None,
    dtype: type = np.float32,
    size: float = 0.5,
    **config: Any,
) -> Path:
    """A PEFT folder for the model in `base`. only: names of modules, all by default; ranks: by the end of a name."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for module, (rows, cols) in linear_modules(base).items():
        if only and not module.endswith(tuple(only)):
            continue
        r = next((value for end, value in (ranks or {}).items() if module.endswith(end)), rank)
        a = rng.standard_normal((r, cols)) / np.sqrt(cols)
        b = rng.standard_normal((rows, r)) * size / np.sqrt(r)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.astype(dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.astype(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    written = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.1,
        "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "modules_to_save": None, "rank_pattern": ranks or {}, "alpha_pattern": {},
        "target_modules": sorted({module.rpartition(".")[2] for module in linear_modules(base)}),
        "megatron_core": "megatron.core", "loftq_config": {}, **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def factors_of(lora: Path) -> dict[str, tuple[Floats, Floats, float]]:
    """Module -> A, B and the scale, as PEFT computes them."""
    config = json.loads((lora / "adapter_config.json").read_text())
    tensors = load_file(lora / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        b = tensors[name.replace("lora_A", "lora_B")]
        alpha = next((v for end, v in config["alpha_pattern"].items() if module.endswith(end)), config["lora_alpha"])
        scale = alpha / (np.sqrt(len(a)) if config["use_rslora"] else len(a))
        found[module] = a.astype(np.float32), b.astype(np.float32), float(scale)
    return found


def merge(base: Path, lora: Path, folder: Path) -> Path:
    """The model with W + scale * B A in the place of W."""
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    for module, (a, b, scale) in factors_of(lora).items():
        wide = weights[f"{module}.weight"].astype(np.float64) + scale * (b.astype(np.float64) @ a.astype(np.float64))
        weights[f"{module}.weight"] = wide.astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def to_gguf_lora(base: Path, lora: Path, path: Path, *, quant: str = "F32", **metadata: str) -> Path:
    """The adapter as llama.cpp's converter writes it: llama's q and k with their rows in pairs."""
    import gguf

    config = json.loads((base / "config.json").read_text())
    arch = str(config["model_type"]).removesuffix("_text")
    arch = "llama" if arch == "mistral" else arch
    writer = gguf.GGUFWriter(path, metadata.get("arch", arch))
    writer.add_type(metadata.get("kind", "adapter"))
    writer.add_string("adapter.type", metadata.get("adapter_type", "lora"))
    kind = gguf.GGMLQuantizationType[quant]
    for module, (a, b, scale) in factors_of(lora).items():
        writer_alpha = scale * len(a)
        if arch == "llama" and module.endswith(("q_proj", "k_proj")):
            b = interleave(b, config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"])
        name = gguf_name(f"{module}.weight", arch)
        for suffix, values in (("a", a), ("b", b)):
            encoded = values if quant == "F32" else gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{name}.lora_{suffix}", np.ascontiguousarray(encoded), raw_dtype=kind)
    writer.add_float32("adapter.lora.alpha", writer_alpha)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
