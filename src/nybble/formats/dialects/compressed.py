"""compressed-tensors folders: pack-quantized and int-quantized (2 to 8 bits) and float-quantized (e4m3).

pack-quantized:  weight_packed i32, codes packed along the inputs, each code stored as its signed value + 2**(bits - 1);
                 weight_shape [2]; weight_scale [out, groups]; weight_zero_point i32 packed along the outputs;
                 weight_g_idx i32 [in] where groups do not lie in order. Words hold a stream of bits; files older than
                 2026 with 3, 5, 6 or 7 bits have whole codes in each word instead, which their width tells.
int-quantized:   weight i8, weight_scale, weight_zero_point i8
float-quantized: weight f8_e4m3, weight_scale: one number, one per row, or one per block
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nybble.core.errors import CheckpointError
from nybble.formats.dialects.logical import Logical, Tensors, damaged, part
from nybble.formats.stored import Stored, floats_as, read_array, read_floats
from nybble.formats.words import pack_words, unpack_padded, unpack_words
from nybble.quant.weights import Float8, GroupedInt

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
_FLOATS = ("F16", "BF16", "F32")
BITS = (2, 3, 4, 5, 6, 7, 8)


def read_compressed(config: Mapping[str, object], tensors: Tensors, where: str) -> list[Logical]:
    """Every quantised matrix of a folder. Raises CheckpointError for what cannot be right or is not supported."""
    widths = _widths(config, where)
    if config.get("sparsity_config"):
        raise CheckpointError(f"{where}: sparse compressed-tensors folders are not supported")
    found = []
    for name in tensors:
        if name.endswith(".weight_packed"):
            found.append(_packed(tensors, name.removesuffix(".weight_packed"), widths, where))
        elif name.endswith(".weight_scale") and f"{name.removesuffix('_scale')}" in tensors:
            found.append(_plain(tensors, name.removesuffix(".weight_scale"), config, where))
    return found


def _groups(config: Mapping[str, object], where: str) -> list[Mapping[str, object]]:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(f"{where}: the quantisation config has no config_groups: get it again")
    return list(groups.values())


def _widths(config: Mapping[str, object], where: str) -> tuple[int, ...]:
    """The numbers of bits that weights of this folder may have."""
    bits = set()
    for group in _groups(config, where):
        name = group.get("format") or config.get("format", "dense")
        weights = group.get("weights")
        if name not in _FORMATS:
            raise CheckpointError(f"{where}: the compressed-tensors format {name!r} is not supported")
        if isinstance(weights, dict):
            number = weights.get("num_bits")
            if type(number) is not int or number not in BITS:
                raise CheckpointError(f"{where}: weights of {number!r} bits are not supported")
            bits.add(number)
    return tuple(sorted(bits))


def _block(config: Mapping[str, object], where: str) -> tuple[int, int] | None:
    for group in _groups(config, where):
        weights = group.get("weights")
        block = weights.get("block_structure") if isinstance(weights, dict) else None
        if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
            return block[0], block[1]
    return None


def _packed(tensors: Tensors, stem: str, widths: tuple[int, ...], where: str) -> Logical:
    packed = part(tensors, f"{stem}.weight_packed", ("I32",), where)
    scale = part(tensors, f"{stem}.weight_scale", _FLOATS, where)
    shape_tensor = part(tensors, f"{stem}.weight_shape", ("I64", "I32"), where)
    shape = [int(n) for n in read_array(shape_tensor).reshape(-1)[:3]]
    if len(shape) != 2 or not all(0 < n < 1 << 24 for n in shape) or packed.shape[:1] != (shape[0],):
        raise damaged(where, shape_tensor.name, "does not give the shape of the weight beside it")
    outputs, inputs = shape
    dense = [bits for bits in widths if packed.shape == (outputs, -(-inputs * bits // 32))]
    padded = [bits for bits in widths if packed.shape == (outputs, -(-inputs // (32 // bits)))]
    if len(dense) != 1 and len(padded) != 1:
        raise damaged(where, packed.name, f"has the shape {list(packed.shape)}, which no number of bits in use gives")
    is_dense = len(dense) == 1
    bits = dense[0] if is_dense else padded[0]
    unpack = unpack_words if is_dense else unpack_padded
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    if scale.shape != (outputs, groups) or not groups or inputs % groups:
        raise damaged(where, scale.name, f"has the shape {list(scale.shape)} for {outputs} x {inputs} weights")
    zero = (
        part(tensors, f"{stem}.weight_zero_point", ("I32",), where) if f"{stem}.weight_zero_point" in tensors else None
    )
    order = part(tensors, f"{stem}.weight_g_idx", ("I32", "I64"), where) if f"{stem}.weight_g_idx" in tensors else None
    per_row = -(-outputs * bits // 32) if is_dense else -(-outputs // (32 // bits))
    if zero is not None and zero.shape != (per_row, groups):
        raise damaged(where, zero.name, f"has the shape {list(zero.shape)} instead of {[per_row, groups]}")
    if order is not None and order.shape != (inputs,):
        raise damaged(where, order.name, f"has the shape {list(order.shape)} instead of {[inputs]}")

    def read() -> GroupedInt:
        codes = unpack(read_array(packed), bits, inputs)
        zeros = None
        if zero is not None:
            columns = unpack(np.ascontiguousarray(read_array(zero).T), bits, outputs)
            zeros = np.ascontiguousarray(columns.T.astype(np.int16))
        g_idx = None if order is None else np.ascontiguousarray(read_array(order), np.int32)
        if g_idx is not None and (g_idx.min() < 0 or g_idx.max() >= groups):
            raise damaged(where, f"{stem}.weight_g_idx", f"names a group outside of 0 to {groups - 1}")
        return GroupedInt(bits, inputs // groups, codes, np.ascontiguousarray(read_floats(scale)), zeros, g_idx)

    stored = tuple(t for t in (packed, scale, zero, order) if t is not None)
    return Logical(f"{stem}.weight", (outputs, inputs), bits, stored, read)


def _plain(tensors: Tensors, stem: str, config: Mapping[str, object], where: str) -> Logical:
    weight = part(tensors, f"{stem}.weight", ("I8", "F8_E4M3"), where)
    scale = part(tensors, f"{stem}.weight_scale", _FLOATS, where)
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise damaged(where, weight.name, "is not a matrix")
    outputs, inputs = weight.shape
    rows = scale.shape if len(scale.shape) == 2 else (*scale.shape, 1) if scale.shape else (1, 1)
    zero_name = f"{stem}.weight_zero_point"
    if weight.format.name == "I8":
        zero = part(tensors, zero_name, ("I8",), where) if zero_name in tensors else None
        if rows[0] not in (1, outputs) or inputs % rows[1] or (zero is not None and zero.shape != scale.shape):
            raise damaged(where, scale.name, f"has the shape {list(scale.shape)} for {outputs} x {inputs} weights")

        def read_int() -> GroupedInt:
            # As unsigned codes: 128 more, and so is the zero point.
            codes = read_array(weight).view(np.uint8) ^ np.uint8(128)
            wide = (outputs, rows[1])
            scales = np.broadcast_to(read_floats(scale).reshape(rows), wide)
            zeros = None
            if zero is not None:
                zeros = np.broadcast_to(read_array(zero).reshape(rows).astype(np.int16) + np.int16(128), wide)
            return GroupedInt(8, inputs // rows[1], codes, scales, zeros)

        return Logical(weight.name, (outputs, inputs), 8, (weight, scale), read_int)
    block = None if rows in ((1, 1), (outputs, 1)) else _block(config, where)
    wanted = rows if block is None else (-(-outputs // block[0]), -(-inputs // block[1]))
    if rows != wanted or (block is None and (rows[0] not in (1, outputs) or rows[1] != 1)):
        raise damaged(where, scale.name, f"has the shape {list(scale.shape)} for {outputs} x {inputs} weights")

    def read_float() -> Float8:
        scales = np.ascontiguousarray(read_floats(scale), np.float32).reshape(rows)
        return Float8(read_array(weight), scales, block)

    return Logical(weight.name, (outputs, inputs), 8, (weight, scale), read_float)


def write_packed(stem: str, weight: GroupedInt, *, dtype: str) -> dict[str, Stored]:
    """The stored tensors of one matrix, pack-quantized. dtype: of the scales, that of the model."""
    outputs, inputs = weight.shape
    out = {
        f"{stem}.weight_packed": Stored.of(pack_words(weight.codes, weight.bits)),
        f"{stem}.weight_scale": floats_as(weight.scales, dtype),
        f"{stem}.weight_shape": Stored.of(np.array([outputs, inputs], np.int64)),
    }
    if weight.zeros is not None:
        columns = np.ascontiguousarray(weight.zeros.T.astype(np.uint8))
        out[f"{stem}.weight_zero_point"] = Stored.of(np.ascontiguousarray(pack_words(columns, weight.bits).T))
    if weight.g_idx is not None:
        out[f"{stem}.weight_g_idx"] = Stored.of(weight.g_idx)
    return out


def write_float8(stem: str, weight: Float8, *, dtype: str) -> dict[str, Stored]:
    """The stored tensors of one matrix, float-quantized with a scale per row or for all."""
    return {
        f"{stem}.weight": Stored("F8_E4M3", weight.codes),
        f"{stem}.weight_scale": floats_as(weight.scales, dtype),
    }
