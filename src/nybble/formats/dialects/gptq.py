"""GPTQ folders, read and written. Layout: AutoGPTQ's `QuantLinear`, as GPTQModel and transformers load it.

    qweight int32 [in * bits / 32, out]      codes, packed along the inputs
    qzeros  int32 [groups, out * bits / 32]  zero points, packed along the outputs
    scales  f16   [groups, out]
    g_idx   int32 [in]                       the group of each input

There are two versions. The first stores each zero point less one, taken off whole words, so that a zero point of 0
borrows from its neighbour; adding the same constant to the whole stream of bits gives every zero point back. The second
stores zero points as they are. Files are known that carry the wrong label: symmetric ones give themselves away.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from nybble.core.errors import CheckpointError
from nybble.formats.dialects.logical import Logical, Tensors, damaged, group_size_in, number_in, part
from nybble.formats.safetensors import SafeTensor
from nybble.formats.stored import Stored, read_array, read_floats
from nybble.formats.words import pack_words, unpack_words
from nybble.quant.weights import GroupedInt

BITS = (2, 3, 4, 8)
_FLOATS = ("F16", "BF16", "F32")


def read_gptq(config: Mapping[str, object], tensors: Tensors, where: str) -> list[Logical]:
    """Every quantised matrix of a folder. Raises CheckpointError for what cannot be right."""
    bits, group_size = number_in(config, "bits", BITS, where), group_size_in(config, where)
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict) or not all(str(rule).startswith("-:") for rule in dynamic):  # "-:": left out
        raise CheckpointError(f"{where}: GPTQ folders whose layers differ (dynamic) are not supported")
    if config.get("pack_dtype", "int32") != "int32":
        raise CheckpointError(f"{where}: GPTQ codes packed in {config['pack_dtype']!r} are not supported, only int32")
    version = str(config.get("checkpoint_format", config.get("format", "gptq")))
    if version not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{where}: the GPTQ format {version!r} is not supported (supported: gptq, gptq_v2)")
    is_v2, symmetric = version == "gptq_v2", bool(config.get("sym", True))
    found = []
    for name in tensors:
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            found.append(_logical(tensors, stem, bits, group_size, is_v2=is_v2, symmetric=symmetric, where=where))
    return found


def _logical(
    tensors: Tensors, stem: str, bits: int, group_size: int, *, is_v2: bool, symmetric: bool, where: str
) -> Logical:
    qweight = part(tensors, f"{stem}.qweight", ("I32",), where)
    qzeros = part(tensors, f"{stem}.qzeros", ("I32",), where)
    scales = part(tensors, f"{stem}.scales", _FLOATS, where)
    g_idx = part(tensors, f"{stem}.g_idx", ("I32",), where) if f"{stem}.g_idx" in tensors else None
    if len(qweight.shape) != 2 or len(scales.shape) != 2 or qweight.shape[0] * 32 % bits or 0 in scales.shape:
        raise damaged(where, qweight.name, "has no shape that GPTQ gives")
    inputs, outputs = qweight.shape[0] * 32 // bits, qweight.shape[1]
    size = inputs if group_size == -1 else group_size
    groups = -(-inputs // size)
    if scales.shape != (groups, outputs):
        raise damaged(where, scales.name, f"has the shape {list(scales.shape)} instead of {[groups, outputs]}")
    if qzeros.shape != (groups, -(-outputs * bits // 32)):
        raise damaged(where, qzeros.name, f"has the shape {list(qzeros.shape)}, which is not one zero point per scale")
    if g_idx is not None and g_idx.shape != (inputs,):
        raise damaged(where, g_idx.name, f"has the shape {list(g_idx.shape)} instead of {[inputs]}")

    def read() -> GroupedInt:
        codes = np.ascontiguousarray(unpack_words(np.ascontiguousarray(read_array(qweight).T), bits, inputs))
        zeros = _zeros(read_array(qzeros), bits, outputs, is_v2=is_v2, symmetric=symmetric)
        order = None if g_idx is None else _order(g_idx, size, groups, where)
        return GroupedInt(bits, size, codes, np.ascontiguousarray(read_floats(scales).T), zeros, order)

    stored = tuple(t for t in (qweight, qzeros, scales, g_idx) if t is not None)
    return Logical(f"{stem}.weight", (outputs, inputs), bits, stored, read)


def _order(g_idx: SafeTensor, size: int, groups: int, where: str) -> npt.NDArray[np.int32] | None:
    order = np.ascontiguousarray(read_array(g_idx), np.int32)
    if order.size and not (int(order.min()) >= 0 and int(order.max()) < groups):
        raise damaged(where, g_idx.name, f"names a group outside of 0 to {groups - 1}")
    return None if (order == np.arange(order.size) // size).all() else order


def _zeros(
    words: npt.NDArray[np.int32], bits: int, outputs: int, *, is_v2: bool, symmetric: bool
) -> npt.NDArray[np.int16] | None:
    """Zero points [out, groups]; None if all are in the middle."""
    stored, middle = unpack_words(words, bits, outputs), 1 << (bits - 1)
    if symmetric and (stored == middle).all():
        is_v2 = True  # whatever the label says
    elif symmetric and (stored == middle - 1).all():
        is_v2 = False
    zeros = (stored if is_v2 else unpack_words(_shift_stream(words, bits, 1), bits, outputs)).astype(np.int16)
    return None if (zeros == middle).all() else np.ascontiguousarray(zeros.T)


def _shift_stream(words: npt.NDArray[np.int32], bits: int, step: int) -> npt.NDArray[np.int32]:
    """Adds `step` (1 or -1) to every field of a row of words as one subtraction or addition per run of words would.

    Runs are single words where the fields divide them, and three words for 3 bits.
    """
    run = 1 if 32 % bits == 0 else bits
    pad = -words.shape[1] % run
    wide = np.pad(np.ascontiguousarray(words).view(np.uint32), ((0, 0), (0, pad)))
    ones = pack_words(np.ones((1, 32 * run // bits), np.uint8), bits).view(np.uint32).reshape(-1)
    parts = wide.reshape(len(words), -1, run)
    out = np.empty_like(parts)
    carry = np.zeros(parts.shape[:2], np.int64)
    for i in range(run):
        total = parts[:, :, i].astype(np.int64) + step * int(ones[i]) + carry
        out[:, :, i] = (total & 0xFFFFFFFF).astype(np.uint32)
        carry = total >> 32
    return np.ascontiguousarray(out.reshape(len(words), -1)[:, : words.shape[1]]).view(np.int32)


def write_gptq(stem: str, weight: GroupedInt, *, version: int) -> dict[str, Stored]:
    """The stored tensors of one matrix.

    version: 1 stores each zero point less one, so that it cannot say 0.

    Raises:
        ValueError: version 1 is asked for a zero point of 0, or the shape cannot be packed.
    """
    outputs, inputs = weight.shape
    bits, groups = weight.bits, weight.scales.shape[1]
    if inputs * bits % 32 or outputs * bits % 32:
        raise ValueError(f"GPTQ packs {bits}-bit codes in whole words, which {outputs} x {inputs} weights do not fill")
    middle = 1 << (bits - 1)
    zeros = np.full((outputs, groups), middle) if weight.zeros is None else weight.zeros
    least = int(version == 1)
    if int(zeros.min()) < least or int(zeros.max()) >= 1 << bits:
        raise ValueError(
            f"zero points from {int(zeros.min())} to {int(zeros.max())} do not fit {bits} bits in version {version} of "
            "GPTQ's format"
        )
    stored_zeros = np.ascontiguousarray((zeros - least).T.astype(np.uint8))
    scales = Stored.of(np.ascontiguousarray(weight.scales.T, np.float16))
    return {
        f"{stem}.qweight": Stored.of(np.ascontiguousarray(pack_words(weight.codes, bits).T)),
        f"{stem}.qzeros": Stored.of(pack_words(stored_zeros, bits)),
        f"{stem}.scales": scales,
        f"{stem}.g_idx": Stored.of(weight.groups()),
    }
