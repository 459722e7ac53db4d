"""AWQ folders in the `gemm` layout, read and written. Layout: AutoAWQ's `WQLinear_GEMM`.

qweight int32 [in, out / 8]      codes of 4 bits, packed along the outputs in AWQ's order
qzeros  int32 [groups, out / 8]  zero points as they are, packed in the same way
scales  f16   [groups, out]
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nybble.core.errors import CheckpointError
from nybble.formats.dialects.logical import Logical, Tensors, damaged, group_size_in, number_in, part
from nybble.formats.stored import Stored, read_array, read_floats
from nybble.formats.words import pack_awq, unpack_awq
from nybble.quant.weights import GroupedInt


def read_awq(config: Mapping[str, object], tensors: Tensors, where: str) -> list[Logical]:
    """Every quantised matrix of a folder. Raises CheckpointError for what cannot be right."""
    number_in(config, "bits" if "bits" in config else "w_bit", (4,), where)
    group_size = group_size_in({"group_size": config.get("group_size", config.get("q_group_size", -1))}, where)
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if version != "gemm":
        raise CheckpointError(f"{where}: the AWQ layout {version!r} is not supported, only gemm")
    return [
        _logical(tensors, name.removesuffix(".qweight"), group_size, where)
        for name in tensors
        if name.endswith(".qweight")
    ]


def _logical(tensors: Tensors, stem: str, group_size: int, where: str) -> Logical:
    qweight = part(tensors, f"{stem}.qweight", ("I32",), where)
    qzeros = part(tensors, f"{stem}.qzeros", ("I32",), where)
    scales = part(tensors, f"{stem}.scales", ("F16", "BF16", "F32"), where)
    if len(qweight.shape) != 2 or 0 in qweight.shape:
        raise damaged(where, qweight.name, "is not a matrix")
    inputs, outputs = qweight.shape[0], qweight.shape[1] * 8
    size = inputs if group_size == -1 else group_size
    groups = inputs // size
    if inputs % size or scales.shape != (groups, outputs) or qzeros.shape != (groups, outputs // 8):
        raise damaged(
            where, scales.name, f"has the shape {list(scales.shape)} for {inputs} inputs and {outputs} outputs"
        )

    def read() -> GroupedInt:
        codes = np.ascontiguousarray(unpack_awq(read_array(qweight)).T)
        zeros = np.ascontiguousarray(unpack_awq(read_array(qzeros)).T.astype(np.int16))
        return GroupedInt(4, size, codes, np.ascontiguousarray(read_floats(scales).T), zeros)

    return Logical(f"{stem}.weight", (outputs, inputs), 4, (qweight, qzeros, scales), read)


def write_awq(stem: str, weight: GroupedInt) -> dict[str, Stored]:
    """The stored tensors of one matrix. Raises ValueError if AWQ's layout cannot hold it."""
    outputs, inputs = weight.shape
    if weight.bits != 4 or weight.g_idx is not None or outputs % 8 or inputs % weight.group_size:
        raise ValueError(f"AWQ's layout needs 4 bits, whole groups in order and outputs in eights, not {weight.shape}")
    zeros = np.full(weight.scales.shape, 8) if weight.zeros is None else weight.zeros
    return {
        f"{stem}.qweight": Stored.of(pack_awq(np.ascontiguousarray(weight.codes.T))),
        f"{stem}.qzeros": Stored.of(pack_awq(np.ascontiguousarray(zeros.T.astype(np.uint8)))),
        f"{stem}.scales": Stored.of(np.ascontiguousarray(weight.scales.T, np.float16)),
    }
