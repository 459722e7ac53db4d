"""The decoder in torch: one layer in memory at a time, differentiable, with a view of what every linear reads."""

from __future__ import annotations

from nybble.backends.torch.layer import Layer, Observer
from nybble.backends.torch.model import TorchDecoder
from nybble.backends.torch.rope import Rope

__all__ = ["Layer", "Observer", "Rope", "TorchDecoder"]
