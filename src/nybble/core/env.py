"""Environment variables, read in one place and checked.

Each function reads its variable when it is called, so a test or a program may set it before it loads a model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from nybble.core.errors import ConfigError

Isa = Literal["generic", "avx2", "avx512"]
ActivationType = Literal["int8", "f32"]
TorchOps = Literal["auto", "triton", "torch"]


def isa() -> Isa | None:
    """NYBBLE_ISA: force an instruction set. None: the best one of this machine."""
    value = os.environ.get("NYBBLE_ISA", "")
    for known in get_args(Isa):
        if value == known:
            return known  # type: ignore[no-any-return]
    if value:
        raise _bad("NYBBLE_ISA", value, get_args(Isa))
    return None


def activation_type() -> ActivationType:
    """NYBBLE_ACT: the type that activations are multiplied in. f32 is slow and judges int8, the default."""
    value = os.environ.get("NYBBLE_ACT", "")
    for known in get_args(ActivationType):
        if value == known:
            return known  # type: ignore[no-any-return]
    if value:
        raise _bad("NYBBLE_ACT", value, get_args(ActivationType))
    return "int8"


def torch_ops() -> TorchOps:
    """NYBBLE_TORCH_OPS: what runs the torch backend's operations. auto: Triton's kernels on a GPU, torch elsewhere."""
    value = os.environ.get("NYBBLE_TORCH_OPS", "")
    for known in get_args(TorchOps):
        if value == known:
            return known  # type: ignore[no-any-return]
    if value:
        raise _bad("NYBBLE_TORCH_OPS", value, get_args(TorchOps))
    return "auto"


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


def _bad(name: str, value: str, allowed: tuple[str, ...]) -> ConfigError:
    return ConfigError(f"the environment variable {name} must be one of {', '.join(allowed)}, not {value!r}")
