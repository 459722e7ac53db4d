"""An adapter on the CPU: its factors, packed for the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nybble import _native
from nybble.adapter import Adapter, LowRank

_Factors = tuple[str, int, npt.NDArray[Any], npt.NDArray[Any], float]


class CpuAdapter:
    """What steps name; `CpuModel.load_adapter` makes it. It never changes, so any number of steps may use it."""

    def __init__(self, native: _native.Adapter) -> None:
        self.native = native

    @property
    def memory_bytes(self) -> int:
        """Bytes of the packed factors."""
        return self.native.nbytes


def pack_adapter(model: _native.Model, adapter: Adapter) -> CpuAdapter:
    """Pack an adapter layer by layer; steps may run meanwhile.

    Factors become halves, each matrix times the power of two that makes its largest value fill them: that loses less
    than the bfloat16 in which adapters are mostly trained, and halves the bytes that a step reads. With NYBBLE_ACT=f32
    they stay floats.

    Raises:
        CheckpointError: values are not finite.
        ValueError: the factors do not fit the model.
        MemoryError: there is no memory for them.
    """
    in_floats = model.act == "f32"
    native = _native.Adapter(model, "F32" if in_floats else "F16")
    for layer, factors in adapter.layers():
        native.set_layer(layer, [(_floats if in_floats else _halves)(one) for one in factors])
    native.finish()
    return CpuAdapter(native)


def _floats(one: LowRank) -> _Factors:
    a, b = (np.ascontiguousarray(values, np.float32) for values in (one.a, one.b))
    return one.name, len(a), a, b, one.scale


def _halves(one: LowRank) -> _Factors:
    (a, a_shift), (b, b_shift) = _as_halves(one.a), _as_halves(one.b)
    return one.name, len(a), a, b, float(np.ldexp(one.scale, -a_shift - b_shift))


def _as_halves(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float16], int]:
    """The values times 2**shift, the largest of them between 2**14 and 2**15."""
    largest = np.max(np.abs(values))
    shift = 15 - int(np.frexp(largest)[1]) if largest > 0 else 0
    return np.ldexp(values, shift).astype(np.float16), shift
