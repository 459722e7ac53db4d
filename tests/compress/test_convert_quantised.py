"""`nybble convert` between GPTQ, AWQ, compressed-tensors and GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models import make_tiny
from nybble.checkpoint import open_checkpoint
from nybble.compress.convert.blocks import gguf_format, to_blocks
from nybble.compress.convert.folder import open_folder
from nybble.compress.convert.outcome import Outcome
from nybble.compress.convert.run import convert
from nybble.compress.methods import Silent
from nybble.core.errors import ConfigError
from nybble.formats.dialects.awq import write_awq
from nybble.formats.dialects.compressed import write_float8, write_packed
from nybble.formats.dialects.gptq import write_gptq
from nybble.formats.safetensors import read_folder
from nybble.formats.safetensors_writer import Entry, write_shards
from nybble.formats.stored import Stored
from nybble.quant.reference import dequantize
from nybble.quant.weights import Float8, GroupedInt

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def rounded(
    values: np.ndarray[Any, Any], bits: int, group: int, *, symmetric: bool, act_order: bool = False
) -> GroupedInt:
    """Round to nearest, with scales in float16."""
    outputs, inputs = values.shape
    size = inputs if group == -1 else group
    order = np.random.default_rng(0).permutation(inputs) if act_order else np.arange(inputs)
    parts = values[:, order].reshape(outputs, -1, size).astype(np.float64)
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    low, high = np.minimum(parts.min(2), 0), np.maximum(parts.max(2), 0)
    scales = np.abs(parts).max(2) / middle if symmetric else (high - low) / top
    scales = np.maximum(scales, 1e-5).astype(np.float16)
    wide = scales.astype(np.float64)
    zeros = np.full(wide.shape, middle) if symmetric else np.clip(np.round(-low / wide), 1, top)
    codes = np.clip(np.round(parts / wide[:, :, None]) + zeros[:, :, None], 0, top).astype(np.uint8)
    g_idx = np.empty(inputs, np.int32)
    g_idx[order] = np.arange(inputs) // size
    back = np.empty_like(order)
    back[order] = np.arange(inputs)
    return GroupedInt(
        bits,
        size,
        np.ascontiguousarray(codes.reshape(outputs, inputs)[:, back]),
        scales,
        None if symmetric else zeros.astype(np.int16),
        g_idx if act_order else None,
    )


def quantised(plain: Path, target: Path, method: str, bits: int = 4, group: int = 32, **options: Any) -> Path:
    """A folder as quantisers write it, from our writers of each layout and independent rounding."""
    target.mkdir()
    zero_shift, version = options.pop("zero_shift", 0), options.pop("version", 1)
    label = options.pop("label", "gptq" if version == 1 else "gptq_v2")
    symmetric = options.setdefault("symmetric", True)
    stored: dict[str, Stored] = {}
    for name, tensor in read_folder(plain)[0].items():
        array = np.frombuffer(tensor.file.view[tensor.begin : tensor.end], np.float32).reshape(tensor.shape)
        if not name.endswith("_proj.weight"):
            stored[name] = Stored.of(array.astype(np.float16))
            continue
        weight, stem = rounded(array, bits, group, **options), name.removesuffix(".weight")
        if zero_shift:
            assert weight.zeros is not None
            weight.zeros[0, 0] = zero_shift - 1
        if method == "gptq":
            stored |= write_gptq(stem, weight, version=version)
        elif method == "awq":
            stored |= write_awq(stem, weight)
        else:
            stored |= write_packed(stem, weight, dtype="F16")
    write_shards(target, [Entry.of(n, s) for n, s in stored.items()])
    config = json.loads((plain / "config.json").read_text())
    config["dtype"] = "float16"
    if method == "gptq":
        described: dict[str, Any] = {
            "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "checkpoint_format": label,
            "desc_act": bool(options.get("act_order")), "damp_percent": 0.05,
        }  # fmt: skip
    elif method == "awq":
        described = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    else:
        weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group}
        described = {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}},
        }  # fmt: skip
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": described}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((plain / name).read_bytes())
    return target


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("models") / "llama", hidden_size=64, intermediate_size=128)


def run(source: Path, target: Path, to: str | None = None, progress: Silent | None = None) -> Outcome:
    outcome = convert(source, target, progress or Silent(), to=to)
    assert outcome.proof is not None
    assert outcome.proof.lossless
    return outcome


def decoded(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: tensor.to_float32() for name, tensor in open_checkpoint(path).tensors.items()}


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    return {n: bytes(t.file.view[t.begin : t.end]) for n, t in read_folder(folder)[0].items()}


def described(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, -1])
def test_around_the_three_formats_every_byte_is_the_same(
    group: int, symmetric: bool, plain: Path, tmp_path: Path
) -> None:
    source = quantised(plain, tmp_path / "gptq", "gptq", 4, group, symmetric=symmetric)
    ring = ["awq", "compressed-tensors", "gptq", "compressed-tensors", "awq", "gptq"]
    before = source
    for i, to in enumerate(ring):
        run(before, tmp_path / f"{i}", to)
        assert described(tmp_path / f"{i}")["quant_method"] == to
        before = tmp_path / f"{i}"
    assert tensor_bytes(before) == tensor_bytes(source)
    assert described(before)["sym"] is symmetric
    assert described(before)["group_size"] == group
    for name, values in decoded(source).items():
        np.testing.assert_array_equal(values, decoded(tmp_path / "0")[name])
        np.testing.assert_array_equal(values, decoded(tmp_path / "1")[name])


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_other_widths_and_act_order_go_to_compressed_tensors_and_back(
    bits: int, act_order: bool, plain: Path, tmp_path: Path
) -> None:
    source = quantised(plain, tmp_path / "gptq", "gptq", bits, act_order=act_order)
    run(source, tmp_path / "ct", "compressed-tensors")
    run(tmp_path / "ct", tmp_path / "back", "gptq")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(source)
    assert described(tmp_path / "back")["desc_act"] is act_order
    with pytest.raises(ConfigError, match=rf"cannot be written as awq: it has {bits} bits"):
        run(source, tmp_path / "awq", "awq")
    assert not (tmp_path / "awq").exists()


def test_act_order_is_refused_where_groups_lie_in_order(plain: Path, tmp_path: Path) -> None:
    source = quantised(plain, tmp_path / "gptq", "gptq", act_order=True)
    with pytest.raises(ConfigError, match=r"proj\.weight cannot be written as awq: .*act-order, g_idx"):
        run(source, tmp_path / "awq", "awq")
    with pytest.raises(ConfigError, match=r"proj\.weight has no equal in GGUF: .*act-order, g_idx"):
        run(source, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["gptq"]


def test_a_zero_point_of_0_needs_version_2(plain: Path, tmp_path: Path) -> None:
    source = quantised(plain, tmp_path / "awq", "awq", symmetric=False, zero_shift=1)
    progress = Notes()
    run(source, tmp_path / "gptq", "gptq", progress)
    assert described(tmp_path / "gptq")["checkpoint_format"] == "gptq_v2"
    assert any("zero points are 0, which version 1" in note for note in progress.notes)
    run(tmp_path / "gptq", tmp_path / "back", "awq")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(source)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("right", [True, False])
def test_the_wrong_version_on_the_label_is_found_and_repaired(
    symmetric: bool, version: int, right: bool, plain: Path, tmp_path: Path
) -> None:
    names = {1: "gptq", 2: "gptq_v2"}
    truth = quantised(plain, tmp_path / "truth", "gptq", symmetric=symmetric, version=version)
    source = quantised(
        plain, tmp_path / "gptq", "gptq", symmetric=symmetric, version=version,
        label=names[version if right else 3 - version],
    )  # fmt: skip
    folder = open_folder(source)
    assert bool(folder.notes) is not right
    for to, target in (("awq", "awq"), ("hf", "hf"), ("gguf", "m.gguf")):
        progress = Notes()
        run(source, tmp_path / target, to, progress)
        assert any("is labelled" in note for note in progress.notes) is not right
    expected = decoded(truth)
    for name, values in decoded(tmp_path / "hf").items():
        np.testing.assert_array_equal(values, expected[name])
    for name, values in decoded(tmp_path / "awq").items():
        np.testing.assert_array_equal(values, expected[name])
    if right:
        with pytest.raises(ConfigError, match="there is nothing to repair"):
            run(source, tmp_path / "mended", "gptq")
    else:
        run(source, tmp_path / "mended", "gptq")
        assert described(tmp_path / "mended")["checkpoint_format"] == "gptq"
        assert described(tmp_path / "mended")["damp_percent"] == 0.05
        assert not open_folder(tmp_path / "mended").notes
        assert decoded(tmp_path / "mended").keys() == expected.keys()
        np.testing.assert_array_equal(decoded(tmp_path / "mended")["layers.0.attn.q"], expected["layers.0.attn.q"])


CASES = [
    (2, 32, True, "Q4_0"), (3, 32, False, "Q4_0"), (4, 32, True, "Q4_0"), (4, 64, True, "Q4_0"),
    (4, -1, True, "Q4_0"), (4, 32, False, "Q5_0"), (8, 64, True, "Q8_0"),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "group", "symmetric", "expected"), CASES)
def test_grouped_integers_become_gguf_blocks(
    bits: int, group: int, symmetric: bool, expected: str, plain: Path, tmp_path: Path
) -> None:
    method = "gptq" if bits != 4 or symmetric else "awq"
    source = quantised(plain, tmp_path / "folder", method, bits, group, symmetric=symmetric)
    outcome = run(source, tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert {checkpoint.tensors[f"layers.1.{name}"].format.name for name in ("attn.q", "ffn.down")} == {expected}
    assert expected in outcome.report.by_type
    run(tmp_path / "m.gguf", tmp_path / "hf", "hf")
    run(source, tmp_path / "straight", "hf")
    one, other = decoded(tmp_path / "hf"), decoded(tmp_path / "straight")
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Phi 3 has several matrices in one, Gemma's norms lack one."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2 if family != "gemma3" else 6}
    plain = make_tiny(family, tmp_path / "plain", **sizes)
    source = quantised(plain, tmp_path / "gptq", "gptq")
    run(source, tmp_path / "m.gguf")
    assert open_checkpoint(tmp_path / "m.gguf").tensors["layers.0.ffn.up"].format.name == "Q4_0"
    run(source, tmp_path / "awq", "awq")


def matrix(scales: list[float], zeros: list[int], codes: int = 16) -> GroupedInt:
    rng = np.random.default_rng(1)
    return GroupedInt(
        4,
        32,
        rng.integers(0, codes, (1, 32 * len(scales))).astype(np.uint8),
        np.array([scales], np.float16),
        np.array([zeros], np.int16),
    )


def test_q4_1_is_taken_where_its_offset_is_exact() -> None:
    exact, rough = matrix([0.25, 0.5], [3, 7]), matrix([0.1, 0.3], [3, 7])
    for weight, name in ((exact, "Q4_1"), (rough, "Q5_0")):
        fmt = gguf_format(weight)
        assert fmt.name == name
        blocks = to_blocks(weight, fmt)
        np.testing.assert_array_equal(dequantize(fmt, blocks.tobytes()), weight.decode().reshape(-1))


def test_scales_that_gguf_cannot_hold_are_refused() -> None:
    good = matrix([0.25], [8])
    odd = GroupedInt(4, 32, good.codes, np.array([[1 / 3]], np.float32))
    with pytest.raises(ValueError, match="not a float16"):
        gguf_format(odd)
    with pytest.raises(ValueError, match="whole blocks"):
        gguf_format(GroupedInt(4, 16, good.codes, np.ones((1, 2), np.float16)))
    wide = np.arange(256, dtype=np.uint8).reshape(1, 256)
    with pytest.raises(ValueError, match="reach from -3 to 252"):
        gguf_format(GroupedInt(8, 256, wide, np.ones((1, 1), np.float16), np.full((1, 1), 3)))


def test_a_matrix_that_differs_is_named(plain: Path, tmp_path: Path) -> None:
    source = quantised(plain, tmp_path / "ct", "compressed-tensors", 5)
    with pytest.raises(ConfigError, match=r"proj\.weight cannot be written as gptq: it has 5 bits"):
        run(source, tmp_path / "gptq", "gptq")
    with pytest.raises(ConfigError, match="is a compressed-tensors folder already"):
        run(source, tmp_path / "again", "compressed-tensors")


def test_8_bit_floats_become_plain_and_nothing_else(plain: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "fp8"
    folder.mkdir()
    stored: dict[str, Stored] = {}
    for name, tensor in read_folder(plain)[0].items():
        array = np.frombuffer(tensor.file.view[tensor.begin : tensor.end], np.float32).reshape(tensor.shape)
        if name.endswith("_proj.weight"):
            codes = rng.integers(0, 120, array.shape).astype(np.uint8)
            scales = np.full((len(array), 1), 0.125, np.float32)
            stored |= write_float8(name.removesuffix(".weight"), Float8(codes, scales), dtype="BF16")
        else:
            stored[name] = Stored.of(array)
    write_shards(folder, [Entry.of(n, s) for n, s in stored.items()])
    config = json.loads((plain / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}, "format": "float-quantized"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((plain / "tokenizer.json").read_bytes())
    run(folder, tmp_path / "hf", "hf")
    outcome = convert(folder, tmp_path / "bf16", Silent(), to="hf", dtype="bf16")
    assert outcome.proof is not None
    assert not any("_proj" in change.name for change in outcome.proof.changes)  # 4 significant bits and a power of two
    with pytest.raises(ConfigError, match="only --to hf can say its values"):
        run(folder, tmp_path / "gptq", "gptq")
    with pytest.raises(ConfigError, match="GGUF has no type for the values"):
        run(folder, tmp_path / "m.gguf")
