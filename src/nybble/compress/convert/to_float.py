"""To a plain Hugging Face folder: from a GGUF file, from a quantised folder, or from a plain one in another type.

Without a type asked for, tensors of 16 bits stay as they are; vectors that a GGUF file had to widen get the type of its
matrices back where that loses nothing; and everything quantised becomes float32, the type that holds a code times a
scale. config.json names a type that holds all of them, because readers convert to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nybble.checkpoint import Tensor, open_checkpoint
from nybble.compress.convert.folder import Folder, open_folder
from nybble.compress.convert.outcome import Conversion, Outcome
from nybble.compress.convert.proof import Proof, compare, plain_values, values_of
from nybble.compress.convert.to_gguf import release
from nybble.compress.convert.write_folder import FolderPlan, check_target, write_folder
from nybble.compress.methods import Progress
from nybble.compress.safetensors.model import FolderModel, open_folder_model
from nybble.compress.safetensors.side_files import copy_side_files, write_side_files
from nybble.core.errors import CheckpointError, ConfigError
from nybble.formats.safetensors import SafeTensor, read_folder
from nybble.formats.safetensors_writer import Entry
from nybble.formats.stored import floats_as, read_floats, size_of, widen_bf16

Floats = npt.NDArray[np.float32]

_FLOATS = ("F32", "F16", "BF16")
_SHORT = ("F16", "BF16")
_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def to_float(asked: Conversion, progress: Progress) -> Outcome:
    """Raises:
    ConfigError: the source is plain already and no type is asked for.
    CheckpointError, TokenizerError, ModelNotFoundError: the source cannot be read, or not be said in a folder.
    OutputError: the target exists or cannot be written.
    """
    check_target(asked)
    plan = _from_folder(asked) if asked.source.is_dir() else _from_gguf(asked)
    return write_folder(asked, plan, progress)


def _from_gguf(asked: Conversion) -> FolderPlan:
    original = open_checkpoint(asked.source)
    model = open_folder_model(asked.source)
    dtypes = _gguf_dtypes(model, asked.dtype)
    stored: dict[str, list[str]] = {}
    for name in model.checkpoint.tensors:
        stored.setdefault(model.stored_name(name), []).append(name)
    entries = [_joined_entry(model, name, parts, dtypes) for name, parts in stored.items()]

    def prove(folder: Path, progress: Progress) -> Proof:
        written = open_checkpoint(folder)
        return compare(values_of(original), values_of(written), progress, str(asked.target))

    return FolderPlan(
        entries,
        _with_dtype(model.config, _widest({entry.dtype for entry in entries})),
        lambda folder: write_side_files(model.checkpoint, folder),
        prove,
        model.checkpoint.file_bytes,
        model.num_weights,
        max(8 * int(np.prod(entry.shape)) for entry in entries),
        notes=_notes(asked, any(t.format.name not in _FLOATS for t in original.tensors.values())),
        may_change=asked.dtype is not None,
    )


def _gguf_dtypes(model: FolderModel, wanted: str | None) -> dict[str, str]:
    """Of each tensor by its canonical name; parts of one stored tensor are matrices and have one format."""
    tensors = model.checkpoint.tensors
    if wanted is not None:
        return dict.fromkeys(tensors, wanted)
    matrices = {tensor.format.name for tensor in tensors.values() if len(tensor.shape) > 1}
    short = next(iter(matrices)) if len(matrices) == 1 and matrices <= set(_SHORT) else None
    found = {}
    for name, tensor in tensors.items():
        fits = tensor.format.name in _SHORT
        if len(tensor.shape) == 1 and short is not None:
            values = _values(model, name)
            fits = _same(values, _widened(floats_as(values, short).array))
            found[name] = short if fits else "F32"
        else:
            found[name] = tensor.format.name if fits else "F32"
    return found


def _joined_entry(model: FolderModel, name: str, parts: list[str], dtypes: Mapping[str, str]) -> Entry:
    tensors = [model.checkpoint.tensors[part] for part in parts]
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    kinds = {dtypes[part] for part in parts}
    dtype = kinds.pop() if len(kinds) == 1 else "F32"

    def read() -> memoryview:
        if len(parts) == 1 and _lies_so(model, parts[0], tensors[0], dtype):
            return tensors[0].data
        arrays = []
        for part, tensor in zip(parts, tensors, strict=True):
            arrays.append(_narrowed(_values(model, part), dtype, f"{model.checkpoint.path}: the tensor {part!r}"))
            model.checkpoint.release(tensor)
        whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return whole.reshape(-1).view(np.uint8).data

    return Entry(name, dtype, shape, size_of(dtype, shape), read)


def _lies_so(model: FolderModel, name: str, tensor: Tensor, dtype: str) -> bool:
    return type(tensor) is Tensor and tensor.format.name == dtype and not model.sources[name].plus_one


def _values(model: FolderModel, name: str) -> Floats:
    """As the folder stores them: Gemma's norms less one."""
    values = model.checkpoint.tensors[name].to_float32()
    return values - np.float32(1) if model.sources[name].plus_one else values


def _from_folder(asked: Conversion) -> FolderPlan:
    folder = open_folder(asked.source)
    if folder.kind == "hf" and asked.dtype is None:
        raise ConfigError(
            f"{asked.source} is a plain folder already: give --dtype to change its type, or --to gguf for one file"
        )
    entries = [_entry(folder, name, asked.dtype) for name in folder.order]

    def prove(work: Path, progress: Progress) -> Proof:
        written, _ = read_folder(work)
        after = {name: plain_values(tensor) for name, tensor in written.items()}
        return compare(folder.values(), after, progress, str(asked.target))

    return FolderPlan(
        entries,
        _with_dtype(folder.config, _widest({entry.dtype for entry in entries if entry.dtype in _FLOATS})),
        lambda work: copy_side_files(folder.path, work),
        prove,
        folder.file_bytes,
        folder.num_weights,
        max(8 * int(np.prod(entry.shape)) for entry in entries),
        notes=(*folder.notes, *_notes(asked, bool(folder.packed))),
        may_change=asked.dtype is not None,
    )


def _entry(folder: Folder, name: str, wanted: str | None) -> Entry:
    logical, where = folder.packed.get(name), f"{folder.path}: the tensor {name!r}"
    if logical is not None:
        dtype = wanted or "F32"

        def decode() -> memoryview:
            values = _narrowed(logical.read().decode(), dtype, where)
            release(logical)
            return values.reshape(-1).view(np.uint8).data

        return Entry(name, dtype, logical.shape, size_of(dtype, logical.shape), decode)
    tensor = folder.plain[name]
    if wanted is None or tensor.format.name not in _FLOATS or tensor.format.name == wanted:
        return copied(tensor)

    def narrow() -> memoryview:
        values = _narrowed(read_floats(tensor).astype(np.float32), wanted, where)
        return values.reshape(-1).view(np.uint8).data

    return Entry(name, wanted, tensor.shape, size_of(wanted, tensor.shape), narrow)


def copied(tensor: SafeTensor) -> Entry:
    """A tensor as it is."""
    size = tensor.end - tensor.begin
    view: Callable[[], memoryview] = lambda: tensor.file.view[tensor.begin : tensor.end]  # noqa: E731
    return Entry(tensor.name, tensor.format.name, tensor.shape, size, view)


def _narrowed(values: Floats, dtype: str, where: str) -> npt.NDArray[np.generic]:
    """Raises CheckpointError if a value leaves the range of the type."""
    with np.errstate(over="ignore"):
        array = floats_as(values, dtype).array
    if dtype != "F32" and np.isinf(_widened(array)).sum() > np.isinf(values).sum():
        raise CheckpointError(f"{where} has values too large for {_TORCH[dtype]}: choose --dtype bf16 or f32")
    return array


def _widened(array: npt.NDArray[np.generic]) -> Floats:
    return widen_bf16(array.view(np.uint16)) if array.dtype == np.uint16 else array.astype(np.float32)


def _same(a: Floats, b: Floats) -> bool:
    return bool((a == b).all())


def _widest(dtypes: set[str]) -> str:
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _with_dtype(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    rest = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    # The first for transformers 5, the second for those before it.
    return {**rest, "dtype": _TORCH[dtype], "torch_dtype": _TORCH[dtype]}


def _notes(asked: Conversion, quantised: bool) -> tuple[str, ...]:
    if not quantised:
        return ()
    undone = "the model is quantised: its values are kept, what that cost is not undone"
    if asked.dtype is not None:
        return (undone,)
    return (undone, "they become float32, in which none changes; --dtype bf16 or f16 halves the size and rounds them")
