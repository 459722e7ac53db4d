"""Importance matrices: both of llama.cpp's formats."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from nybble.compress.gguf.imatrix import ImportanceMatrix, read_imatrix
from nybble.core.errors import CheckpointError, ConfigError, OutputError

NAME = "blk.0.attn_q.weight"


def add(matrix: ImportanceMatrix, name: str, inputs: npt.NDArray[np.float64]) -> None:
    matrix.add(name, np.sum(np.square(inputs), axis=0), len(inputs))


def collected() -> ImportanceMatrix:
    matrix = ImportanceMatrix(datasets=("text.txt",), num_chunks=3, chunk_size=512)
    rng = np.random.default_rng(0)
    for tokens in (5, 7):
        add(matrix, NAME, rng.standard_normal((tokens, 8)))
    return matrix


def test_mean_squares_are_over_all_tokens() -> None:
    rng = np.random.default_rng(0)
    seen = np.concatenate([rng.standard_normal((tokens, 8)) for tokens in (5, 7)])
    expected = np.mean(np.square(seen), axis=0)
    weights = collected().weights(NAME, 8)
    assert weights is not None
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert collected().weights("another", 8) is None


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    collected().write(tmp_path / "i.gguf")
    read = read_imatrix(tmp_path / "i.gguf")
    assert (read.datasets, read.num_chunks, read.chunk_size) == (("text.txt",), 3, 512)
    assert read.entries[NAME].count == 12
    np.testing.assert_array_equal(read.weights(NAME, 8), collected().weights(NAME, 8))
    with pytest.raises(OutputError, match="exists already"):
        collected().write(tmp_path / "i.gguf")


def test_the_file_is_what_llama_cpp_expects(tmp_path: Path) -> None:
    collected().write(tmp_path / "i.gguf")
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["text.txt"]
    assert [tensor.name for tensor in reader.tensors] == [NAME + ".in_sum2", NAME + ".counts"]
    assert reader.tensors[1].data.reshape(-1).tolist() == [12.0]


def legacy_bytes(name: str = NAME, calls: int = 4) -> bytes:
    encoded = name.encode()
    values = np.arange(8, dtype=np.float32) * calls
    entry = struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, 8) + values.tobytes()
    return struct.pack("<i", 1) + entry + struct.pack("<ii", 9, 4) + b"text"


def test_the_older_format_is_read(tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(legacy_bytes())
    read = read_imatrix(tmp_path / "i.dat")
    assert (read.num_chunks, read.datasets) == (9, ("text",))
    weights = read.weights(NAME, 8)
    assert weights is not None
    assert weights.tolist() == list(range(8))


@pytest.mark.parametrize("size", [0, 3, 4, 9, 30, 50])
def test_cut_files_are_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "i.dat").write_bytes(legacy_bytes()[:size])
    with pytest.raises(CheckpointError, match="whole importance matrix"):
        read_imatrix(tmp_path / "i.dat")


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="no importance matrix"):
        read_imatrix(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_imatrix(tmp_path / "none")


def test_sums_that_cannot_be_are_refused(tmp_path: Path) -> None:
    matrix = collected()
    matrix.entries[NAME].sums[3] = np.nan
    matrix.write(tmp_path / "i.gguf")
    with pytest.raises(CheckpointError, match="not sums of squares"):
        read_imatrix(tmp_path / "i.gguf")


def test_inputs_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ConfigError, match=f"the inputs of {NAME} are not finite"):
        add(ImportanceMatrix(), NAME, np.array([[1.0, np.inf]]))


def test_another_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="made for another model"):
        collected().weights(NAME, 16)


def test_a_tensor_that_saw_nothing_counts_evenly() -> None:
    matrix = ImportanceMatrix()
    add(matrix, NAME, np.zeros((0, 4)))
    weights = matrix.weights(NAME, 4)
    assert weights is not None
    assert weights.tolist() == [1, 1, 1, 1]
