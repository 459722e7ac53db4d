"""Training with quantisation in the loop: the weights learn to lie on the grid that the file will have."""

from __future__ import annotations

from nybble.compress.qat.options import QatOptions
from nybble.compress.qat.run import run_qat

__all__ = ["QatOptions", "run_qat"]
