"""Rotary frequencies as data: every backend gets the same numbers.

Rotary embeddings: Su et al. 2021 (arXiv 2104.09864). YaRN: Peng et al. 2023 (arXiv 2309.00071). LongRoPE: Ding et al.
2024 (arXiv 2402.13753). Llama 3's smooth interpolation as its published configuration defines it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nybble.core.spec import RopeScaling, RopeSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def inverse_frequencies(rope: RopeSpec, context: int) -> tuple[npt.NDArray[np.float32], float]:
    """Radians per position of each turned pair, float32 [rotary_dim / 2], and the factor on cos and sin.

    context: tokens a sequence may reach; LongRoPE picks its factors by it.
    """
    import numpy as np

    exponent = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    frequencies = (np.float32(1.0) / np.power(np.float32(rope.base), exponent)).astype(np.float32)
    scaling, magnitude = rope.scaling, rope.scaling.attention_factor
    if scaling.kind == "linear":
        frequencies = frequencies / np.float32(scaling.factor)
    elif scaling.kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    elif scaling.kind == "yarn":
        frequencies = _yarn(frequencies, rope)
        if magnitude is None:
            magnitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    elif scaling.kind == "longrope":
        is_long = context > scaling.original_context
        factors = scaling.long_factors if is_long else scaling.short_factors
        frequencies = frequencies / np.array(factors, dtype=np.float32)
    if scaling.freq_factors:
        frequencies = frequencies / np.array(scaling.freq_factors, dtype=np.float32)
    return np.ascontiguousarray(frequencies, dtype=np.float32), 1.0 if magnitude is None else magnitude


def _llama3(frequencies: npt.NDArray[np.float32], scaling: RopeScaling) -> npt.NDArray[np.float32]:
    """High frequencies stay, low ones are divided by the factor, those between are blended."""
    import numpy as np

    wavelength = 2 * math.pi / frequencies
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_context
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = np.where(wavelength > original / low, frequencies / scaling.factor, frequencies)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return np.where(between, blended, scaled).astype(np.float32)


def _yarn(frequencies: npt.NDArray[np.float32], rope: RopeSpec) -> npt.NDArray[np.float32]:
    """Blend by how often a pair turns within the original context: often, it stays; hardly, it is interpolated."""
    import numpy as np

    scaling, dim = rope.scaling, rope.rotary_dim

    def pair_that_turns(times: float) -> float:
        return dim * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(rope.base))

    low = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(scaling.beta_slow)), dim - 1)
    span = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / span, 0, 1)
    blended = frequencies / scaling.factor * ramp + frequencies * (1 - ramp)
    return np.asarray(blended, dtype=np.float32)
