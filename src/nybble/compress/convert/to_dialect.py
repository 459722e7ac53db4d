"""Between GPTQ, AWQ and compressed-tensors: the same codes, scales and zero points, packed in another way.

What the target cannot say is refused before a byte is written. All matrices of a folder share a group size and a number
of bits, because that is how the three describe themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from nybble.compress.convert.describe import Facts, Target, describe
from nybble.compress.convert.folder import Folder, open_folder
from nybble.compress.convert.outcome import Conversion, Outcome
from nybble.compress.convert.proof import Proof, compare
from nybble.compress.convert.to_float import copied
from nybble.compress.convert.to_gguf import release
from nybble.compress.convert.write_folder import FolderPlan, check_target, write_folder
from nybble.compress.methods import Progress
from nybble.compress.safetensors.side_files import copy_side_files
from nybble.core.errors import ConfigError
from nybble.formats.dialects.awq import write_awq
from nybble.formats.dialects.compressed import write_packed
from nybble.formats.dialects.gptq import BITS as GPTQ_BITS
from nybble.formats.dialects.gptq import write_gptq
from nybble.formats.dialects.logical import Logical
from nybble.formats.safetensors_writer import Entry
from nybble.formats.stored import Stored, floats_as
from nybble.quant.weights import GroupedInt

_SCALES = ("F16", "BF16", "F32")
_TORCH = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def to_dialect(asked: Conversion, to: str, progress: Progress) -> Outcome:
    """to: gptq, awq or compressed-tensors.

    Raises:
        ConfigError: the source is not quantised, is what is asked for already, or holds what the target cannot say.
        CheckpointError: the source cannot be read.
        OutputError: the target exists or cannot be written.
    """
    check_target(asked)
    if not asked.source.is_dir():
        raise ConfigError(f"{asked.source} is not a folder: --to {to} repacks quantised folders, quantize makes them")
    folder = open_folder(asked.source)
    if folder.kind == "hf":
        raise ConfigError(f"{asked.source} is not quantised: nybble quantize --to makes {to} folders of it")
    if folder.kind == to and not (to == "gptq" and folder.notes):
        raise ConfigError(f"{asked.source} is a {to} folder already, and there is nothing to repair in it")
    facts = gather(folder)
    target = _target(folder, facts, to)
    return write_folder(asked, _plan(asked, folder, facts, target), progress)


def gather(folder: Folder) -> dict[str, Facts]:
    """What every matrix needs of a target, by name. Reads them all once."""
    found = {}
    for name, logical in folder.packed.items():
        weight = logical.read()
        if not isinstance(weight, GroupedInt):
            raise ConfigError(
                f"{folder.path}: {name} is not made of integers with scales and zero points ({folder.kind}), so only "
                "--to hf can say its values"
            )
        middle = 1 << (weight.bits - 1)
        zeros = weight.zeros
        scales = tuple(d for d in _SCALES if (_back(weight, d) == weight.scales.astype(np.float32)).all())
        found[name] = Facts(
            weight.bits,
            logical.shape,
            weight.group_size,
            weight.scales.shape[1],
            zeros is None or bool((zeros == middle).all()),
            weight.g_idx is not None,
            middle if zeros is None else int(zeros.min()),
            middle if zeros is None else int(zeros.max()),
            scales,
        )
        release(logical)
    return found


def _back(weight: GroupedInt, dtype: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    with np.errstate(over="ignore"):
        stored = floats_as(weight.scales, dtype).array
    return (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else stored.astype(np.float32)


def _target(folder: Folder, facts: Mapping[str, Facts], to: str) -> Target:
    """Raises ConfigError that names what cannot be said."""
    first = next(iter(facts.values()))
    for name, one in facts.items():
        problem = _problem(one, first, to)
        if problem is not None:
            raise ConfigError(f"{folder.path}: {name} cannot be written as {to}: {problem}")
    whole_rows = all(one.group_size == one.shape[1] for one in facts.values())
    sizes = {one.group_size for one in facts.values()}
    if len(sizes) > 1 and not whole_rows:
        listed = ", ".join(map(str, sorted(sizes)))
        raise ConfigError(f"{folder.path}: its matrices have groups of {listed}, and {to} has one size for all of them")
    model = _TORCH.get(str(folder.config.get("dtype", folder.config.get("torch_dtype"))), "F16")
    preferred = ("F16",) if to != "compressed-tensors" else (model, "F16", "F32")
    return Target(
        to,
        first.bits,
        -1 if whole_rows else sizes.pop(),
        all(one.symmetric for one in facts.values()),
        any(one.act_order for one in facts.values()),
        2 if any(one.lowest_zero < 1 for one in facts.values()) else 1,
        next(dtype for dtype in preferred if all(dtype in one.scales for one in facts.values())),
        _left_out(folder),
        "lm_head.weight" in facts,
    )


def _problem(one: Facts, first: Facts, to: str) -> str | None:
    outputs, inputs = one.shape
    if one.bits != first.bits:
        return f"it has {one.bits} bits and others {first.bits}"
    if to == "awq" and one.bits != 4:
        return f"it has {one.bits} bits, and AWQ's layout 4"
    if to == "gptq" and one.bits not in GPTQ_BITS:
        return f"it has {one.bits} bits, and GPTQ's layout 2, 3, 4 or 8"
    if to == "awq" and one.act_order:
        return "its groups do not lie in order (act-order, g_idx), which AWQ's layout cannot say"
    if inputs % one.group_size or one.num_groups * one.group_size != inputs:
        return f"groups of {one.group_size} do not divide its {inputs} inputs" if to != "gptq" else None
    if to == "awq" and outputs % 8:
        return f"AWQ packs outputs in eights, and it has {outputs}"
    if to == "gptq" and (inputs * one.bits % 32 or outputs * one.bits % 32):
        return f"GPTQ packs codes in whole words, which {outputs} x {inputs} do not fill"
    if one.highest_zero >= 1 << one.bits:
        return f"it has a zero point of {one.highest_zero}, which {one.bits} bits cannot hold"
    if to != "compressed-tensors" and "F16" not in one.scales:
        return f"a scale of it is not a float16, which is what {to} keeps scales in"
    return None


def _left_out(folder: Folder) -> tuple[str, ...]:
    """Stems of linears that are not quantised: matrices of layers."""
    return tuple(
        name.removesuffix(".weight")
        for name, tensor in folder.plain.items()
        if len(tensor.shape) == 2 and name.endswith(".weight") and ".layers." in name
    )


def _plan(asked: Conversion, folder: Folder, facts: Mapping[str, Facts], target: Target) -> FolderPlan:
    entries: list[Entry] = []
    types: dict[str, str] = {}
    layouts: dict[object, dict[str, Stored]] = {}
    for name in folder.order:
        logical = folder.packed.get(name)
        if logical is None:
            entries.append(copied(folder.plain[name]))
            continue
        one = facts[name]
        key = (one.shape, one.num_groups, one.act_order)
        if key not in layouts:
            layouts[key] = _write("", _empty(one, target), target)
        made = _entries(name.removesuffix(".weight"), logical, layouts[key], target)
        types |= dict.fromkeys((entry.name for entry in made), f"{target.kind} {target.bits} bit")
        entries += made

    def prove(work: Path, progress: Progress) -> Proof:
        return compare(folder.values(), open_folder(work).values(), progress, str(asked.target))

    return FolderPlan(
        entries,
        {**folder.config, "quantization_config": describe(target, folder.quantisation)},
        lambda work: copy_side_files(folder.path, work),
        prove,
        folder.file_bytes,
        folder.num_weights,
        max(8 * int(np.prod(one.shape)) for one in facts.values()),
        types,
        (*folder.notes, *_notes(folder, target)),
    )


def _entries(stem: str, logical: Logical, layout: Mapping[str, Stored], target: Target) -> list[Entry]:
    """Of one matrix, which is read when its first tensor is asked for, and let go with its last."""
    held: dict[str, Stored] = {}

    def reader(suffix: str) -> Callable[[], memoryview]:
        def read() -> memoryview:
            if not held:
                weight = logical.read()
                assert isinstance(weight, GroupedInt)
                held.update(_write("", weight, target))
                release(logical)
            return held.pop(suffix).array.reshape(-1).view(np.uint8).data

        return read

    return [
        Entry(stem + suffix, stored.dtype, stored.array.shape, stored.num_bytes, reader(suffix))
        for suffix, stored in layout.items()
    ]


def _empty(one: Facts, target: Target) -> GroupedInt:
    """As large as the matrix, to see the shapes of what is stored."""
    scales = np.zeros((one.shape[0], one.num_groups), np.float32)
    zeros = np.ones(scales.shape, np.int16)
    g_idx = np.arange(one.shape[1], dtype=np.int32) // one.group_size if one.act_order else None
    return GroupedInt(target.bits, one.group_size, np.zeros(one.shape, np.uint8), scales, zeros, g_idx)


def _write(stem: str, weight: GroupedInt, target: Target) -> dict[str, Stored]:
    if target.kind == "awq":
        return write_awq(stem, weight)
    if target.kind == "gptq":
        return write_gptq(stem, weight, version=target.version)
    if target.symmetric:
        weight = replace(weight, zeros=None)
    elif weight.zeros is None:  # others have zero points, and the folder's description is one for all
        weight = replace(weight, zeros=np.full(weight.scales.shape, 1 << (weight.bits - 1), np.int16))
    return write_packed(stem, weight, dtype=target.scale_dtype)


def _notes(folder: Folder, target: Target) -> list[str]:
    notes = []
    if target.kind == "gptq" and target.version == 2:
        notes.append(
            "some zero points are 0, which version 1 of GPTQ's format cannot store: checkpoint_format is gptq_v2"
        )
    model = _TORCH.get(str(folder.config.get("dtype", folder.config.get("torch_dtype"))))
    if target.kind == "compressed-tensors" and model is not None and target.scale_dtype != model:
        notes.append(
            f"scales stay {target.scale_dtype}, because {model} would round them; readers that convert every tensor to "
            "the type in config.json will"
        )
    return notes
