"""Serving with torch: a decoder over the paged cache of the engine, on GPUs or on the CPU."""

from __future__ import annotations

from nybble.backends.torch.serve.model import TorchModel

__all__ = ["TorchModel"]
