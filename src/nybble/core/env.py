"""Environment variables, read in one place and checked.

Each function reads its variable when it is called, so a test or a program may set it before it loads a model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast, get_args

from nybble.core.errors import ConfigError

Isa = Literal["generic", "avx2", "avx512", "amx"]
ActivationType = Literal["int8", "f32"]
TorchOps = Literal["auto", "triton", "torch"]


def isa() -> Isa | None:
    """NYBBLE_ISA: force an instruction set. None: the best one of this machine."""
    return cast("Isa | None", _one_of("NYBBLE_ISA", get_args(Isa)))


def activation_type() -> ActivationType:
    """NYBBLE_ACT: the type that activations are multiplied in. f32 is slow and judges int8, the default."""
    return cast("ActivationType", _one_of("NYBBLE_ACT", get_args(ActivationType)) or "int8")


def torch_ops() -> TorchOps:
    """NYBBLE_TORCH_OPS: what runs the torch backend's operations. auto: Triton's kernels on a GPU, torch elsewhere."""
    return cast("TorchOps", _one_of("NYBBLE_TORCH_OPS", get_args(TorchOps)) or "auto")


def home() -> Path:
    """NYBBLE_HOME: the folder of models and settings. Default: ~/.cache/nybble."""
    value = os.environ.get("NYBBLE_HOME", "")
    return Path(value).expanduser() if value else Path.home() / ".cache" / "nybble"


def hub_cache() -> Path:
    """HF_HUB_CACHE, or hub/ in HF_HOME: where the programs of Hugging Face keep what they download."""
    value = os.environ.get("HF_HUB_CACHE", "")
    if value:
        return Path(value).expanduser()
    value = os.environ.get("HF_HOME", "")
    if value:
        return Path(value).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "huggingface" / "hub"


def ollama_models() -> list[Path]:
    """OLLAMA_MODELS: the folder of Ollama's models. Default: the user's and that of the system's service."""
    value = os.environ.get("OLLAMA_MODELS", "")
    if value:
        return [Path(value).expanduser()]
    return [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def hides_all_gpus() -> bool:
    """CUDA_VISIBLE_DEVICES: whether it names none."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1")


def _one_of(name: str, allowed: tuple[str, ...]) -> str | None:
    """The value of a variable, None where it is not set or empty. Raises ConfigError for what is not allowed."""
    value = os.environ.get(name) or None
    if value is not None and value not in allowed:
        raise ConfigError(f"the environment variable {name} must be one of {', '.join(allowed)}, not {value!r}")
    return value
