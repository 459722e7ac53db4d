"""Brings every pass into the registry of TYPEs: import this, then ask `nybble.compress.methods`."""

from __future__ import annotations

from nybble.compress.gguf import quantize as gguf_pass

__all__ = ["gguf_pass"]
