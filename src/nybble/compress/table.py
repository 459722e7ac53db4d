"""Brings every pass into the registry of TYPEs: import this, then ask `nybble.compress.methods`."""

from __future__ import annotations

from nybble.compress.gguf import quantize as gguf_pass
from nybble.compress.safetensors import types as folder_passes

__all__ = ["folder_passes", "gguf_pass"]
