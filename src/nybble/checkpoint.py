"""A model on disk: one class whatever the container. Tensors stay in the mapped file until somebody reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nybble.core.errors import CheckpointError, ModelNotFoundError
from nybble.core.spec import ModelSpec
from nybble.core.tokenizer_source import GgufTokenizer, TokenizerFile, TokenizerSource
from nybble.families.common import Mapped, Source, expected_shapes
from nybble.families.registry import map_gguf, map_hf
from nybble.formats.dialects.logical import Logical
from nybble.formats.dialects.read import read_dialect
from nybble.formats.gguf import GgufFile
from nybble.formats.mapping import MappedFile
from nybble.formats.safetensors import read_folder, read_json
from nybble.quant.formats import FORMATS, QuantFormat
from nybble.quant.reference import dequantize
from nybble.quant.weights import PackedWeight

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Tensor:
    """A weight matrix [out_features, in_features] or a vector, as it lies in the file.

    data: its whole rows, read-only. plus_one: the value to use is what is stored plus one.
    packed: gives the matrix of a quantised safetensors folder, whose codes do not lie row by row; then data is their
    bytes, of a part of a stored matrix as many of them as belong to it, and only their number says something.
    """

    name: str
    shape: tuple[int, ...]
    format: QuantFormat
    data: memoryview
    plus_one: bool = False
    file: MappedFile | None = field(default=None, repr=False)
    begin: int = 0
    packed: Callable[[], PackedWeight] | None = field(default=None, repr=False)

    def to_float32(self) -> npt.NDArray[np.float32]:
        """Decoded values in this shape."""
        if self.packed is not None:
            return self.packed().decode()
        values = dequantize(self.format, self.data).reshape(self.shape)
        return values + 1 if self.plus_one else values


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a model's files say. sources: where the file has each tensor, by its canonical name."""

    path: Path
    container: str  # "gguf" or "safetensors"
    spec: ModelSpec
    tensors: Mapping[str, Tensor]
    tokenizer: TokenizerSource
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    add_bos: bool
    metadata: Mapping[str, object]
    file_bytes: int
    files: tuple[MappedFile, ...] = ()
    sources: Mapping[str, Source] = field(default_factory=dict)

    @property
    def packed_bytes(self) -> int:
        """Of the matrices of a quantised folder: codes, scales, zero points, whatever is not a plain tensor."""
        plain = [tensor for tensor in self.tensors.values() if tensor.packed is None]
        if len(plain) == len(self.tensors):
            return 0
        headers = sum(8 + int.from_bytes(file.view[:8], "little") for file in self.files)
        return self.file_bytes - headers - sum(tensor.data.nbytes for tensor in plain)

    def release(self, tensor: Tensor) -> None:
        """Give the tensor's pages back to the system: it has been packed and is not read again soon."""
        if tensor.file is not None:
            tensor.file.release(tensor.begin, tensor.begin + len(tensor.data))

    def close(self) -> None:
        """Unmap the files. Tensors must not be read afterwards."""
        for tensor in self.tensors.values():
            tensor.data.release()
        for file in self.files:
            file.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A GGUF file, or a Hugging Face folder with config.json and safetensors.

    Raises:
        ModelNotFoundError: there is nothing at `path`.
        CheckpointError: what is there is damaged, hostile or not supported.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise ModelNotFoundError(f"{path} does not exist: give a GGUF file, a model folder or a name from the catalog")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    return _open_gguf(path)


def _open_gguf(path: Path) -> Checkpoint:
    gguf = GgufFile(path)
    metadata = gguf.metadata
    if isinstance(metadata.get("split.count"), int) and metadata["split.count"] not in (0, 1):
        raise CheckpointError(f"{path} is one of {metadata['split.count']} parts of a split model: join them")

    def read_vector(name: str) -> tuple[float, ...]:
        tensor = gguf.tensors.get(name)
        if tensor is None:
            return ()
        if tensor.format.name != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > 1 << 12:
            raise CheckpointError(f"{path}: the tensor {name!r} is not a short vector of F32: the file is damaged")
        return tuple(dequantize(tensor.format, gguf.data(tensor)).tolist())

    shapes = {name: tensor.shape for name, tensor in gguf.tensors.items()}
    mapped = map_gguf(metadata, shapes, read_vector, str(path))
    stored = {
        n: Tensor(n, t.shape, t.format, gguf.data(t), file=gguf.file, begin=t.begin) for n, t in gguf.tensors.items()
    }
    tokenizer = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    ids = [_token_id(metadata, f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    template = metadata.get("tokenizer.chat_template")
    is_sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    return Checkpoint(
        path=path,
        container="gguf",
        spec=mapped.spec,
        tensors=_canonical(mapped, stored, path),
        tokenizer=GgufTokenizer(tokenizer),
        chat_template=template if isinstance(template, str) else None,
        eos_token_ids=tuple(dict.fromkeys(i for i in ids if i is not None)),
        bos_token_id=_token_id(metadata, "tokenizer.ggml.bos_token_id"),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", is_sentencepiece)),
        metadata=metadata,
        file_bytes=gguf.file.size,
        files=(gguf.file,),
        sources=mapped.sources,
    )


def _open_folder(folder: Path) -> Checkpoint:
    config = read_json(folder / "config.json")
    raw, files = read_folder(folder)
    quantisation = quantisation_config(config, folder)
    packed: dict[str, Logical] = {}
    if quantisation:
        raw, packed = read_dialect(quantisation, raw, str(folder))
    mapped = map_hf(config, frozenset([*raw, *packed]), str(folder / "config.json"))
    stored = {
        n: Tensor(n, t.shape, t.format, t.file.view[t.begin : t.end], file=t.file, begin=t.begin)
        for n, t in raw.items()
    }
    stored |= {name: _packed_tensor(logical) for name, logical in packed.items()}
    tokenizer_config = _optional_json(folder / "tokenizer_config.json")
    generation = _optional_json(folder / "generation_config.json")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    bos = generation.get("bos_token_id", config.get("bos_token_id"))
    return Checkpoint(
        path=folder,
        container="safetensors",
        spec=mapped.spec,
        tensors=_canonical(mapped, stored, folder),
        tokenizer=TokenizerFile(folder / "tokenizer.json", tokenizer_config),
        chat_template=_folder_template(folder, tokenizer_config),
        eos_token_ids=tuple(i for i in (eos if isinstance(eos, list) else [eos]) if type(i) is int and i >= 0),
        bos_token_id=bos if type(bos) is int and bos >= 0 else None,
        add_bos=bool(tokenizer_config.get("add_bos_token", False)),
        metadata=config,
        file_bytes=sum(file.size for file in files),
        files=tuple(files),
        sources=mapped.sources,
    )


def _canonical(mapped: Mapped, stored: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The spec's tensors under their canonical names, each checked against its shape."""
    tensors = {}
    used_rows: dict[str, int] = {}  # of the tensors that hold several
    for name, shape in expected_shapes(mapped.spec).items():
        source = mapped.sources[name]
        tensor = stored.get(source.name)
        if tensor is None:
            raise CheckpointError(f"{path}: the tensor {source.name!r} is missing: get a complete file")
        if tensor.packed is not None:
            tensors[name] = _packed_part(tensor, source, name, shape, path)
            used_rows[source.name] = max(used_rows.get(source.name, 0), (source.rows or (0, tensor.shape[0]))[1])
            continue
        if not tensor.format.has_kernel:
            raise CheckpointError(
                f"{path}: the tensor {source.name!r} is encoded as {tensor.format.name}, which nybble cannot multiply "
                f"yet (it can: {', '.join(f.name for f in FORMATS.values() if f.has_kernel)})"
            )
        data, begin, found = tensor.data, tensor.begin, tensor.shape
        if source.rows is not None and len(found) == 2 and source.rows[1] <= found[0]:
            row = tensor.format.row_bytes(found[1])
            used_rows[source.name] = max(used_rows.get(source.name, 0), source.rows[1])
            data = data[source.rows[0] * row : source.rows[1] * row]
            begin, found = begin + source.rows[0] * row, (source.rows[1] - source.rows[0], found[1])
        if found != shape:
            raise CheckpointError(
                f"{path}: the tensor {source.name!r} has the shape {list(tensor.shape)}, which does not give the "
                f"{list(shape)} that the model's description asks for: the file is damaged"
            )
        tensors[name] = Tensor(name, shape, tensor.format, data, source.plus_one, tensor.file, begin)
    for stored_name, rows in used_rows.items():
        if rows != stored[stored_name].shape[0]:
            raise CheckpointError(
                f"{path}: the tensor {stored_name!r} has {stored[stored_name].shape[0]} rows instead of {rows}: "
                "the file is damaged"
            )
    return tensors


def quantisation_config(config: Mapping[str, object], folder: Path) -> Mapping[str, object]:
    """What says how the folder is quantised: a part of config.json, or a file as the first GPTQ tools wrote it."""
    found = config.get("quantization_config", config.get("compression_config"))
    if found is None:
        found = _optional_json(folder / "quantize_config.json")
        if found and "quant_method" not in found:
            found = {**found, "quant_method": "gptq"}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{folder / 'config.json'}: quantization_config is not an object: get the file again")
    return found


def _packed_tensor(logical: Logical) -> Tensor:
    codes = logical.parts[0]
    size = sum(part.end - part.begin for part in logical.parts)
    fmt = QuantFormat(f"INT{logical.bits}", None, max(logical.shape[1], 1), -(-size // logical.shape[0]), False)
    data = codes.file.view[codes.begin : codes.end]
    return Tensor(logical.name, logical.shape, fmt, data, file=codes.file, begin=codes.begin, packed=logical.read)


def _packed_part(tensor: Tensor, source: Source, name: str, shape: tuple[int, ...], path: Path) -> Tensor:
    """A quantised matrix, or some rows of it, under its canonical name."""
    begin, end = source.rows or (0, tensor.shape[0])
    if end > tensor.shape[0] or (end - begin, tensor.shape[1]) != shape:
        raise CheckpointError(
            f"{path}: the tensor {source.name!r} has the shape {list(tensor.shape)}, which does not give the "
            f"{list(shape)} that the model's description asks for: the file is damaged"
        )
    read = tensor.packed
    assert read is not None
    if source.rows is None:
        return replace(tensor, name=name)
    each = len(tensor.data) // tensor.shape[0]
    data = tensor.data[begin * each : end * each]
    return replace(
        tensor,
        name=name,
        shape=shape,
        data=data,
        begin=tensor.begin + begin * each,
        packed=lambda: read().rows(begin, end),
    )


def _token_id(metadata: Mapping[str, object], key: str) -> int | None:
    value = metadata.get(key)
    return value if type(value) is int and value >= 0 else None


def _optional_json(path: Path) -> dict[str, object]:
    return read_json(path) if path.exists() else {}


def _folder_template(folder: Path, tokenizer_config: Mapping[str, object]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text("utf-8", errors="replace")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
