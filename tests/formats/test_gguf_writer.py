"""GGUF files that nybble writes: read back by nybble and by the `gguf` package, and only there when complete."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import gguf
import numpy as np
import pytest

from nybble.core.errors import OutputError
from nybble.formats.gguf import GgufFile
from nybble.formats.gguf_writer import ALIGNMENT, GgufWriter, TensorInfo, Value, encode_value, file_bytes
from nybble.formats.output import OutputFile
from nybble.quant.formats import FORMATS

KEYS: dict[str, Value] = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.small": 7,
    "a.negative": -7,
    "a.large": 1 << 40,
    "a.float": 0.5,
    "a.words": ["", "zw\u00f6lf", "\U0001f600"],
    "a.numbers": np.arange(5, dtype=np.int32),
    "a.scores": np.array([0.5, -1.5], np.float32),
}
TENSORS = [
    TensorInfo("matrix", (3, 64), FORMATS["Q8_0"]),
    TensorInfo("odd", (5,), FORMATS["F32"]),
    TensorInfo("cube", (2, 3, 4), FORMATS["F16"]),
]


def data_of(info: TensorInfo) -> bytes:
    return np.random.default_rng(info.num_bytes).bytes(info.num_bytes)


def write(path: Path, *, force: bool = False) -> None:
    keys = {key: encode_value(value) for key, value in KEYS.items()}
    with OutputFile(path, force=force) as file:
        writer = GgufWriter(file, keys, TENSORS)
        for info in TENSORS:
            writer.write(info, data_of(info))
        writer.finish()
    assert path.stat().st_size == file_bytes(keys, TENSORS)


def test_nybble_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    read = GgufFile(tmp_path / "a.gguf")
    for key, value in KEYS.items():
        expected = value.tolist() if isinstance(value, np.ndarray) else value
        assert read.metadata[key] == expected
        assert read.value_bytes(key) == encode_value(value)
    assert list(read.tensors) == [info.name for info in TENSORS]
    for info in TENSORS:
        tensor = read.tensors[info.name]
        assert (tensor.shape, tensor.format) == (info.shape, info.format)
        assert tensor.begin % ALIGNMENT == 0
        assert bytes(read.data(tensor)) == data_of(info)


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["a.words"].contents() == KEYS["a.words"]
    assert reader.fields["a.large"].contents() == 1 << 40
    assert [tensor.name for tensor in reader.tensors] == [info.name for info in TENSORS]
    for tensor, info in zip(reader.tensors, TENSORS, strict=True):
        assert tensor.data.tobytes() == data_of(info)


def test_an_existing_file_stays_unless_forced(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write(path)
    assert path.read_text() == "mine"
    write(path, force=True)
    assert path.read_bytes()[:4] == b"GGUF"
    with pytest.raises(OutputError, match="is a folder"):
        write(tmp_path, force=True)


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), OutputFile(tmp_path / "a") as file:
        file.write(b"half")
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="does not fit on the disk"):
        write(tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"the folder .* does not exist"):
        write(tmp_path / "none" / "a.gguf")


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(OutputError, match="exists already"), OutputFile(path) as file:
        file.write(b"new")
        path.write_text("mine")
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_come_in_order_and_whole(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not the turn of odd"), OutputFile(tmp_path / "a") as file:
        GgufWriter(file, {}, TENSORS).write(TENSORS[1], data_of(TENSORS[1]))
    with pytest.raises(ValueError, match="has 3 bytes instead of 204"), OutputFile(tmp_path / "a") as file:
        GgufWriter(file, {}, TENSORS).write(TENSORS[0], b"abc")
    with pytest.raises(ValueError, match="3 tensors have not been written"), OutputFile(tmp_path / "a") as file:
        GgufWriter(file, {}, TENSORS).finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [None, [1, 2], object(), np.zeros((2, 2)), np.zeros(2, np.complex64)])
def test_values_without_a_gguf_type_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="GGUF has no"):
        encode_value(value)  # type: ignore[arg-type]


def test_numbers_too_large_for_gguf_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        encode_value(1 << 64)
