"""Facts about the machine, as the native core sees it."""

from __future__ import annotations

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


def measure_read_gb_s(threads: int | None = None) -> float:
    """10**9 bytes per second that all threads together read from memory. Takes about half a second."""
    return _native.measure_read_bandwidth(chosen_threads(threads), chosen_isa())


def measure_int8_gops(threads: int | None = None) -> float:
    """10**9 8-bit multiplications and additions per second of all threads. Takes about half a second."""
    return _native.measure_int8_peak(chosen_threads(threads), chosen_isa())
