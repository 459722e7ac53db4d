"""The CPU backend: a thin layer over the native core."""

from nybble.backends.cpu.adapter import CpuAdapter
from nybble.backends.cpu.machine import best_isa, default_threads, measure_int8_gops, measure_read_gb_s
from nybble.backends.cpu.model import CacheBlocks, CpuModel, KvType
from nybble.backends.cpu.step import BadLogitsError, Sampled, SampleRow, Scored, Step, StepAdapter

__all__ = [
    "BadLogitsError",
    "CacheBlocks",
    "CpuAdapter",
    "CpuModel",
    "KvType",
    "SampleRow",
    "Sampled",
    "Scored",
    "Step",
    "StepAdapter",
    "best_isa",
    "default_threads",
    "measure_int8_gops",
    "measure_read_gb_s",
]
