"""The sampler on the device, with the CPU sampler's semantics."""

from __future__ import annotations

from nybble.backends.torch.ops.sampling.sample import sample, score

__all__ = ["sample", "score"]
