"""FlashAttention in Triton: tiled, fused, with online softmax and a backward that computes the scores again.

Without a GPU the same kernels run under Triton's interpreter (TRITON_INTERPRET=1), which is slow and for tests.
"""

from __future__ import annotations

from nybble.backends.torch.flash.attention import flash_attention

__all__ = ["flash_attention"]
