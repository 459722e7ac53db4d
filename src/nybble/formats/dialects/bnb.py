"""bitsandbytes folders, read and written. Layout: the state dictionaries of its `Linear4bit` and `Linear8bitLt`.

4 bits:  weight u8 [out * in / 2, 1]  two codes per byte, the first in the high half, over the matrix row by row
         weight.absmax f32 [blocks], or with double quantisation u8 [blocks] with weight.nested_absmax f32 [blocks /
         256] and weight.nested_quant_map f32 [256]; weight.quant_map f32 [16]
         weight.quant_state.bitsandbytes__nf4 (or __fp4): a JSON object as bytes
8 bits:  weight i8 [out, in], SCB f32 [out] the largest absolute value of each row, weight_format u8 0
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from nybble.core.errors import CheckpointError
from nybble.formats.dialects.logical import Logical, Tensors, damaged, part
from nybble.formats.safetensors import SafeTensor
from nybble.formats.stored import Stored, read_array
from nybble.quant.weights import CODEBOOKS, Codebook4, RowInt8

_STATE = ".quant_state.bitsandbytes__"
_NESTED_BLOCK = 256


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """Double quantisation: absmax = quant_map[codes] * scales + offset, one scale for 256 of them."""

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    quant_map: npt.NDArray[np.float32]
    offset: np.float32

    def decode(self) -> npt.NDArray[np.float32]:
        values = self.quant_map[self.codes]
        values *= np.repeat(self.scales, _NESTED_BLOCK)[: values.size]
        values += self.offset
        return values


def read_bnb(config: Mapping[str, object], tensors: Tensors, where: str) -> list[Logical]:
    """Every quantised matrix of a folder. Raises CheckpointError for what cannot be right."""
    threshold = config.get("llm_int8_threshold", 6.0)
    if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 <= threshold < 1e6:
        raise CheckpointError(f"{where}: the quantisation config has llm_int8_threshold = {threshold!r}: not a number")
    found = []
    for name in tensors:
        if _STATE in name:
            weight, table = name.split(_STATE, 1)
            found.append(_four_bits(tensors, weight, table, where))
        elif name.endswith(".SCB"):
            found.append(_eight_bits(tensors, name.removesuffix(".SCB"), float(threshold), where))
    return found


def _four_bits(tensors: Tensors, name: str, table: str, where: str) -> Logical:
    if table not in CODEBOOKS:
        raise CheckpointError(f"{where}: the 4-bit code {table!r} of {name!r} is not supported (supported: nf4, fp4)")
    weight = part(tensors, name, ("U8",), where)
    absmax = part(tensors, f"{name}.absmax", ("F32", "U8"), where)
    state = _state(part(tensors, f"{name}{_STATE}{table}", ("U8",), where), where)
    shape, block = state.get("shape"), state.get("blocksize")
    good = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 24 for n in shape)
    if not good or type(block) is not int or not 32 <= block <= 4096 or block & (block - 1):
        raise damaged(where, name, "has a quant_state without a shape and a block size")
    outputs, inputs = cast("list[int]", shape)
    count = outputs * inputs
    blocks = -(-count // block)
    if weight.end - weight.begin != -(-count // 2) or absmax.shape != (blocks,):
        raise damaged(where, name, f"does not hold {outputs} x {inputs} weights in blocks of {block}")
    is_nested = absmax.format.name == "U8"
    extra = _nested_parts(tensors, name, blocks, state, where) if is_nested else None

    def read() -> Codebook4:
        packed = read_array(weight).reshape(-1)
        codes = np.empty(2 * packed.size, np.uint8)
        codes[0::2], codes[1::2] = packed >> 4, packed & 15
        scales = np.ascontiguousarray(read_array(absmax))
        if extra is not None:
            offset = np.float32(cast("float", state["nested_offset"]))
            scales = NestedAbsmax(scales, read_array(extra[0]), read_array(extra[1]), offset).decode()
        kind = cast('Literal["nf4", "fp4"]', table)
        return Codebook4(kind, codes[:count].reshape(outputs, inputs), scales, block)

    return Logical(name, (outputs, inputs), 4, (weight, absmax, *(extra or ())), read)


def _nested_parts(
    tensors: Tensors, name: str, blocks: int, state: Mapping[str, object], where: str
) -> tuple[SafeTensor, SafeTensor]:
    scales = part(tensors, f"{name}.nested_absmax", ("F32",), where)
    quant_map = part(tensors, f"{name}.nested_quant_map", ("F32",), where)
    offset = state.get("nested_offset")
    if not isinstance(offset, int | float) or state.get("nested_blocksize") != _NESTED_BLOCK:
        raise damaged(where, name, "has a quant_state without the offset and blocks of its double quantisation")
    if scales.shape != (-(-blocks // _NESTED_BLOCK),) or quant_map.shape != (256,):
        raise damaged(where, scales.name, f"does not go with {blocks} blocks")
    return scales, quant_map


def _state(tensor: SafeTensor, where: str) -> dict[str, object]:
    if tensor.end - tensor.begin > 1 << 16:
        raise damaged(where, tensor.name, "is longer than a quant_state can be")
    try:
        state = json.loads(bytes(read_array(tensor).tobytes()))
    except (ValueError, RecursionError):
        raise damaged(where, tensor.name, "is not JSON") from None
    if not isinstance(state, dict):
        raise damaged(where, tensor.name, "is not a JSON object")
    return state


def _eight_bits(tensors: Tensors, stem: str, threshold: float, where: str) -> Logical:
    weight = part(tensors, f"{stem}.weight", ("I8",), where)
    absmax = part(tensors, f"{stem}.SCB", ("F32",), where)
    if len(weight.shape) != 2 or absmax.shape != weight.shape[:1]:
        raise damaged(where, absmax.name, f"does not go with a weight of shape {list(weight.shape)}")
    layout = tensors.get(f"{stem}.weight_format")
    if layout is not None and (layout.format.name != "U8" or int(read_array(layout).reshape(-1)[0]) != 0):
        raise CheckpointError(f"{where}: {layout.name!r} says that the weight is not stored row by row: save it again")

    def read() -> RowInt8:
        return RowInt8(read_array(weight), np.ascontiguousarray(read_array(absmax)), threshold)

    return Logical(weight.name, (weight.shape[0], weight.shape[1]), 8, (weight, absmax), read)


def write_codebook4(
    stem: str, weight: Codebook4, *, dtype: str, nested: NestedAbsmax | None = None
) -> dict[str, Stored]:
    """The stored tensors of one matrix. dtype: of the weight before, as torch calls it. nested: what absmax becomes."""
    flat = weight.codes.reshape(-1)
    even = flat if flat.size % 2 == 0 else np.pad(flat, (0, 1))
    name = f"{stem}.weight"
    state: dict[str, object] = {
        "quant_type": weight.table,
        "blocksize": weight.block,
        "dtype": dtype,
        "shape": list(weight.shape),
    }
    out = {
        name: Stored.of(((even[0::2] << np.uint8(4)) | even[1::2]).reshape(-1, 1)),
        f"{name}.absmax": Stored.of(weight.absmax if nested is None else nested.codes),
        f"{name}.quant_map": Stored.of(CODEBOOKS[weight.table]),
    }
    if nested is not None:
        out[f"{name}.nested_absmax"] = Stored.of(nested.scales)
        out[f"{name}.nested_quant_map"] = Stored.of(nested.quant_map)
        state |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(nested.offset)}
    data = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return out | {f"{name}{_STATE}{weight.table}": Stored.of(data)}


def write_row_int8(stem: str, weight: RowInt8) -> dict[str, Stored]:
    """The stored tensors of one matrix."""
    return {
        f"{stem}.weight": Stored.of(weight.codes),
        f"{stem}.SCB": Stored.of(weight.absmax),
        f"{stem}.weight_format": Stored.of(np.zeros((), np.uint8)),
    }
