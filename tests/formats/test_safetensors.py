"""Reading safetensors folders: right ones in full, wrong ones refused with the place and the reason."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from formats import raw
from nybble.core.errors import CheckpointError
from nybble.formats.safetensors import read_folder, read_json

pytestmark = pytest.mark.unit


def test_one_file(tmp_path: Path) -> None:
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16), "s": np.float32(3.0)}
    save_file({name: np.asarray(value) for name, value in values.items()}, tmp_path / "model.safetensors", {"by": "x"})
    tensors, files = read_folder(tmp_path)
    assert len(files) == 1
    for name, value in values.items():
        tensor = tensors[name]
        assert tensor.shape == np.shape(value)
        assert bytes(tensor.file.view[tensor.begin : tensor.end]) == value.tobytes()
    assert (tensors["a"].format.name, tensors["b"].format.name) == ("F32", "F16")


def test_shards(tmp_path: Path) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.ones(3, np.float32)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors, files = read_folder(tmp_path)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"a": (2,), "b": (3,)}
    assert len(files) == 2
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors is missing"):
        read_folder(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", ".hidden", "sub/x.safetensors", "", ".."])
def test_shards_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="not in its own folder"):
        read_folder(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": np.ones(2, np.float32)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="'a' stands twice"):
        read_folder(tmp_path)


def entry(shape: object = (4,), offsets: object = (0, 16), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


CASES = {
    "empty": (b"", "empty"),
    "short": (b"abc", "only 3 bytes"),
    "header length": (struct.pack("<Q", 2**62) + b"{}", "header claims"),
    "not JSON": (struct.pack("<Q", 2) + b"{x", "not valid JSON"),
    "deep JSON": (struct.pack("<Q", 200_000) + b"[" * 200_000, "not valid JSON"),
    "not UTF-8": (struct.pack("<Q", 2) + b"\xff\xfe", "not valid JSON"),
    "not an object": (raw.safetensors_bytes([]), "not a JSON object"),
    "not an entry": (raw.safetensors_bytes({"a": 1}), "'a' is not described"),
    "no shape": (raw.safetensors_bytes({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "'a' is not described"),
    "negative": (raw.safetensors_bytes({"a": entry(shape=[-4])}, bytes(16)), "'a' is not described"),
    "a flag as a size": (raw.safetensors_bytes({"a": entry(shape=[True])}, bytes(16)), "'a' is not described"),
    "a fraction": (raw.safetensors_bytes({"a": entry(shape=[4.0])}, bytes(16)), "'a' is not described"),
    "three offsets": (raw.safetensors_bytes({"a": entry(offsets=[0, 4, 16])}, bytes(16)), "'a' is not described"),
    "backwards": (raw.safetensors_bytes({"a": entry(offsets=[16, 0])}, bytes(16)), "truncated or damaged"),
    "too small": (raw.safetensors_bytes({"a": entry(offsets=[0, 12])}, bytes(16)), "needs 16 bytes, has 12"),
    "past the end": (raw.safetensors_bytes({"a": entry()}, bytes(15)), "truncated or damaged"),
    "huge": (raw.safetensors_bytes({"a": entry(shape=[2**62] * 8)}, bytes(16)), "truncated or damaged"),
    "unknown type": (raw.safetensors_bytes({"a": entry(dtype="F8_E5M2")}, bytes(16)), "F8_E5M2"),
    "type of a type": (raw.safetensors_bytes({"a": entry(dtype=[1])}, bytes(16)), "does not read"),
    "block type": (raw.safetensors_bytes({"a": entry(dtype="Q4_0", offsets=[0, 72])}, bytes(72)), "does not read"),
    "overlap": (raw.safetensors_bytes({"a": entry(), "b": entry(offsets=[8, 24])}, bytes(24)), "'a' and 'b' overlap"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(tmp_path: Path, case: str) -> None:
    data, reason = CASES[case]
    raw.save(tmp_path / "model.safetensors", data)
    with pytest.raises(CheckpointError) as error:
        read_folder(tmp_path)
    assert reason in str(error.value)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"weight_map": []}', '{"weight_map": {}}'])
def test_wrong_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_folder(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        read_folder(tmp_path)


def test_missing_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_json(tmp_path / "config.json")
