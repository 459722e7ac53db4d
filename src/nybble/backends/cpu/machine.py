"""Facts about the machine, as the native core sees it."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path

from nybble import _native
from nybble.core import env
from nybble.core.errors import ConfigError


def best_isa() -> str:
    """The fastest instruction set that this machine has and nybble has kernels for."""
    return _native.isa()


def chosen_isa() -> str:
    """NYBBLE_ISA, or the best one.

    Raises:
        ConfigError: NYBBLE_ISA names one that this machine cannot run.
    """
    isa = env.isa()
    if isa is None:
        return best_isa()
    if isa not in _native.available_isas():
        known = ", ".join(_native.available_isas())
        raise ConfigError(f"NYBBLE_ISA={isa} cannot run on this machine, which has {known}")
    return isa


def default_threads() -> int:
    """Physical cores that this process may use, within the limits of its control group."""
    return _native.default_threads()


def chosen_threads(threads: int | None) -> int:
    """The number asked for, or the default.

    Raises:
        ConfigError: the number makes no sense.
    """
    if threads is None:
        return default_threads()
    if not 1 <= threads <= 1024:
        raise ConfigError(f"the number of threads must be between 1 and 1024, not {threads}")
    return threads


@functools.cache
def machine_identity() -> bytes:
    """A digest of the compiled kernels and of what their results may depend on in this machine, to the bit.

    The C library chooses its sine and cosine by what the processor can do.
    """
    digest = hashlib.blake2b(Path(_native.__file__).read_bytes())
    digest.update(repr((platform.machine(), platform.libc_ver(), _processor_flags())).encode())
    return digest.digest()


def _processor_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return [platform.processor()]
    names = ("flags", "Features", "model name", "CPU part")
    return [line for line in dict.fromkeys(lines) if line.partition(":")[0].strip() in names]


def measure_read_gb_s(threads: int | None = None) -> float:
    """10**9 bytes per second that all threads together read from memory. Takes about half a second."""
    return _native.measure_read_bandwidth(chosen_threads(threads), chosen_isa())


def measure_int8_gops(threads: int | None = None) -> float:
    """10**9 8-bit multiplications and additions per second of all threads. Takes about half a second."""
    return _native.measure_int8_peak(chosen_threads(threads), chosen_isa())
