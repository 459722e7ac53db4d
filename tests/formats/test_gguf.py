"""Reading GGUF files: right ones in full, wrong ones refused with the place and the reason."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from formats import raw
from nybble.core.errors import CheckpointError
from nybble.formats.gguf import GgufFile

pytestmark = pytest.mark.unit


def read(tmp_path: Path, data: bytes) -> GgufFile:
    return GgufFile(raw.save(tmp_path / "m.gguf", data))


@pytest.mark.parametrize("version", [2, 3])
def test_every_metadata_type(tmp_path: Path, version: int) -> None:
    values = {
        raw.U8: 200, raw.I8: -100, raw.U16: 60000, raw.I16: -30000, raw.U32: 4_000_000_000, raw.I32: -2_000_000_000,
        raw.F32: 0.5, raw.BOOL: True, raw.STRING: "naïve ☃", raw.U64: 2**63, raw.I64: -(2**62), raw.F64: 0.1,
        raw.ARRAY: (raw.ARRAY, [(raw.STRING, ["a", ""]), (raw.I16, [-1, 2, 3])]),
    }  # fmt: skip
    keys = [raw.key(f"k{kind}", kind, value) for kind, value in values.items()]
    metadata = read(tmp_path, raw.gguf_bytes(keys, [], version=version)).metadata
    assert metadata == {f"k{kind}": value for kind, value in values.items() if kind != raw.ARRAY} | {
        "k9": [["a", ""], [-1, 2, 3]]
    }
    assert metadata["k7"] is True


def test_arrays_of_every_scalar(tmp_path: Path) -> None:
    kinds = [k for k in range(13) if k not in (raw.STRING, raw.ARRAY)]
    keys = [raw.key(f"k{k}", raw.ARRAY, (k, [0, 1, 1])) for k in kinds] + [raw.key("empty", raw.ARRAY, (raw.U8, []))]
    metadata = read(tmp_path, raw.gguf_bytes(keys, [])).metadata
    assert metadata == {f"k{k}": [0, 1, 1] for k in kinds} | {"empty": []}


@pytest.mark.parametrize("alignment", [32, 64, 4096])
def test_tensors(tmp_path: Path, alignment: int) -> None:
    matrix = np.arange(6, dtype=np.float32)
    quantised = bytes(range(68))
    data = matrix.tobytes().ljust(alignment, b"\0") + quantised
    keys = [raw.key("general.alignment", raw.U32, alignment)]
    infos = [raw.tensor_info("a", (3, 2), 0, 0), raw.tensor_info("b", (32, 2), 8, alignment)]
    file = read(tmp_path, raw.gguf_bytes(keys, infos, data, alignment=alignment))
    a, b = file.tensors["a"], file.tensors["b"]
    assert (a.shape, a.format.name, b.shape, b.format.name) == ((2, 3), "F32", (2, 32), "Q8_0")
    assert bytes(file.data(a)) == matrix.tobytes()
    assert bytes(file.data(b)) == quantised
    assert file.data(b).readonly


def one(name: str = "a", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return raw.gguf_bytes([], [raw.tensor_info(name, dims, kind, offset)], bytes(16))


HUGE = 2**62
CASES = {
    "empty": (b"", "empty"),
    "short": (b"GG", "GGUF"),
    "magic": (b"GGML" + bytes(20), "does not start with"),
    "version 1": (raw.gguf_bytes([], [], version=1), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
    "no counts": (b"GGUF\3\0\0\0", "8 bytes but 0 are left"),
    "tensor count": (raw.gguf_bytes([], [], counts=(HUGE, 0)), "claims"),
    "key count": (raw.gguf_bytes([], [], counts=(0, HUGE)), "claims"),
    "key length": (raw.gguf_bytes([struct.pack("<Q", HUGE) + bytes(16)], []), "more than 65536"),
    "key twice": (raw.gguf_bytes([raw.key("k", raw.U8, 1)] * 2, []), "'k' stands twice"),
    "value type": (raw.gguf_bytes([raw.string("k") + struct.pack("<I", 13)], []), "unknown type 13"),
    "string length": (
        raw.gguf_bytes([raw.string("k") + struct.pack("<IQ", raw.STRING, HUGE)], []), f"needs {HUGE} bytes"
    ),
    "array count": (
        raw.gguf_bytes([raw.string("k") + struct.pack("<IIQ", raw.ARRAY, raw.U64, HUGE)], []), "bytes but"
    ),
    "string count": (
        raw.gguf_bytes([raw.string("k") + struct.pack("<IIQ", raw.ARRAY, raw.STRING, HUGE)], []), "claims"
    ),
    "array of arrays count": (
        raw.gguf_bytes([raw.string("k") + struct.pack("<IIQ", raw.ARRAY, raw.ARRAY, HUGE)], []), "claims"
    ),
    "element type": (
        raw.gguf_bytes([raw.string("k") + struct.pack("<IIQ", raw.ARRAY, 77, 0)], []), "unknown type 77"
    ),
    "depth": (
        raw.gguf_bytes([raw.string("k") + struct.pack("<I", raw.ARRAY) + struct.pack("<IQ", raw.ARRAY, 1) * 9], []),
        "nests arrays",
    ),
    "alignment zero": (raw.gguf_bytes([raw.key("general.alignment", raw.U32, 0)], []), "general.alignment is 0"),
    "alignment three": (raw.gguf_bytes([raw.key("general.alignment", raw.U32, 3)], []), "power of two"),
    "alignment text": (raw.gguf_bytes([raw.key("general.alignment", raw.STRING, "x")], []), "general.alignment"),
    "tensor twice": (raw.gguf_bytes([], [raw.tensor_info("a", (4,), 0, 0)] * 2, bytes(64)), "'a' stands twice"),
    "no dimensions": (one(dims=()), "0 dimensions"),
    "five dimensions": (one(dims=(1,) * 5), "5 dimensions"),
    "empty dimension": (one(dims=(4, 0)), "shape [0, 4]"),
    "product overflows": (one(dims=(2**33, 2**33, 2**33, 2**33)), "truncated"),
    "encoding": (one(kind=99), "unknown encoding 99"),
    "cut block": (one(dims=(33,), kind=8), "multiples of 32"),
    "offset unaligned": (one(offset=4), "offset 4"),
    "offset past the end": (one(offset=2**63), "truncated"),
    "data past the end": (one(dims=(5,)), "truncated"),
    "overlap": (
        raw.gguf_bytes([], [raw.tensor_info("a", (16,), 0, 0), raw.tensor_info("b", (8,), 0, 32)], bytes(64)),
        "'a' and 'b' overlap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(tmp_path: Path, case: str) -> None:
    data, reason = CASES[case]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            read(tmp_path, data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reason in str(error.value)
    assert "m.gguf" in str(error.value)
    assert peak < 1 << 20


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufFile(tmp_path / "none.gguf")


@pytest.mark.parametrize("end", range(4, 200, 7))
def test_every_truncation_is_refused(tmp_path: Path, end: int) -> None:
    keys = [raw.key("name", raw.STRING, "abc"), raw.key("list", raw.ARRAY, (raw.STRING, ["x"] * 6))]
    whole = raw.gguf_bytes(keys, [raw.tensor_info("a", (16,), 0, 0)], bytes(64))
    assert len(whole) > 199
    with pytest.raises(CheckpointError):
        read(tmp_path, whole[:end])


def test_broken_utf8_is_kept_readable(tmp_path: Path) -> None:
    file = read(tmp_path, raw.gguf_bytes([raw.key("k", raw.ARRAY, (raw.STRING, [b"\xff\xfea"]))], []))
    assert file.metadata["k"] == ["\ufffd\ufffda"]


def test_a_large_vocabulary_is_read_whole(tmp_path: Path) -> None:
    tokens = [f"Ġtoken{i}" for i in range(151_000)]
    path = raw.save(tmp_path / "m.gguf", raw.gguf_bytes([raw.key("k", raw.ARRAY, (raw.STRING, tokens))], []))
    assert GgufFile(path).metadata["k"] == tokens
