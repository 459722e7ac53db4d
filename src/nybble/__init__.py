"""nybble: takes a language model from checkpoint to endpoint.

Importing the package does nothing but give a name: every part is imported where it is used, so that a program that only
wants the version, or `--help`, does not pay for numpy or the native core.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.compress.api import (
        AWQConfig,
        BitsAndBytesConfig,
        GGUFConfig,
        GPTQConfig,
        RoundToNearestConfig,
        quantize,
    )
    from nybble.compress.distil.loss import distillation_loss
    from nybble.compress.prune.api import prune_model
    from nybble.core.lora import LoRARequest
    from nybble.core.sampling import SamplingParams, StructuredOutputsParams
    from nybble.engine.async_engine import AsyncEngine
    from nybble.engine.beam_search import BeamSearchParams
    from nybble.engine.options import EngineOptions
    from nybble.llm import LLM

# The same as in pyproject.toml, which a test checks; to look it up would cost 40 ms at each start.
__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AWQConfig",
    "AsyncEngine",
    "BeamSearchParams",
    "BitsAndBytesConfig",
    "EngineOptions",
    "GGUFConfig",
    "GPTQConfig",
    "LoRARequest",
    "RoundToNearestConfig",
    "SamplingParams",
    "StructuredOutputsParams",
    "distillation_loss",
    "prune_model",
    "quantize",
]

_HOMES = {
    **dict.fromkeys(
        ("quantize", "GPTQConfig", "AWQConfig", "BitsAndBytesConfig", "RoundToNearestConfig", "GGUFConfig"),
        "nybble.compress.api",
    ),
    "distillation_loss": "nybble.compress.distil.loss",
    "prune_model": "nybble.compress.prune.api",
    "LLM": "nybble.llm",
    "AsyncEngine": "nybble.engine.async_engine",
    "BeamSearchParams": "nybble.engine.beam_search",
    "EngineOptions": "nybble.engine.options",
    "LoRARequest": "nybble.core.lora",
    "SamplingParams": "nybble.core.sampling",
    "StructuredOutputsParams": "nybble.core.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
