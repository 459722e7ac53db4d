"""Distillation: a smaller model learns to say what a larger one says."""

from __future__ import annotations

from nybble.compress.distil.run import DistilOptions, run_distil

__all__ = ["DistilOptions", "run_distil"]
