"""Products with low-bit weights: what is packed is what the file means, and the kernels multiply it as it is."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from backends.torch.low_bit_cases import ROWS, blocks, eight_bit_cases, float_activation_cases, grouped, packed
from backends.torch.op_cases import DEVICE, ROUNDING, assert_close, normal
from nybble.backends.torch.ops import low_bit, pack_linear
from nybble.core.errors import ConfigError
from nybble.quant.weights import GroupedInt

pytest.importorskip("triton")
tuning = pytest.importorskip("nybble.backends.torch.ops.kernels.tuning")
tiles = pytest.importorskip("nybble.backends.torch.ops.kernels.tiles")
pytestmark = pytest.mark.kernels
F32, BF16 = torch.float32, torch.bfloat16
FLOAT_CASES = dict(float_activation_cases())
EIGHT_CASES = {name: case for name, *case in eight_bit_cases()}


def with_kernels(monkeypatch) -> None:
    monkeypatch.setenv("NYBBLE_TORCH_OPS", "triton")


@pytest.mark.parametrize("name", FLOAT_CASES)
def test_codes_keep_what_the_file_means(name: str) -> None:
    tensor = FLOAT_CASES[name]
    linear = pack_linear(tensor, DEVICE, F32)
    assert not isinstance(linear, low_bit.DenseLinear)
    wanted = torch.from_numpy(tensor.to_float32()).to(DEVICE)
    assert_close(linear.decode(F32), wanted, 1e-6, name)
    assert 0 < linear.bytes < wanted.numel() * 2


@pytest.mark.parametrize("name", FLOAT_CASES)
def test_products_of_floats(name: str, monkeypatch) -> None:
    tensor = FLOAT_CASES[name]
    linear = pack_linear(tensor, DEVICE, F32)
    weight = torch.from_numpy(tensor.to_float32()).to(DEVICE).double()
    for m, ops in ((3, "torch"), (17, "triton")):
        monkeypatch.setenv("NYBBLE_TORCH_OPS", ops)
        x = normal(m, linear.in_features)
        assert_close(linear(x), x.double() @ weight.t(), ROUNDING[F32], (name, m, ops))


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "W4 g128", "NF4"])
def test_products_in_half_precision(name: str, monkeypatch) -> None:
    """Codes and scales are exact; what is rounded is the result, and a code times a scale where that cannot be late."""
    with_kernels(monkeypatch)
    linear = pack_linear(FLOAT_CASES[name], DEVICE, BF16)
    x = normal(4, linear.in_features, dtype=BF16)
    wanted = x.double() @ linear.decode(F32).double().t()
    assert_close(linear(x), wanted, 2 * ROUNDING[BF16], name)


@pytest.mark.parametrize("meaning", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS", "W4 g128"])
def test_tiles_for_many_tokens(meaning: str, monkeypatch) -> None:
    """Their scales go into the weights."""
    with_kernels(monkeypatch)
    linear = pack_linear(FLOAT_CASES[meaning], DEVICE, F32)
    monkeypatch.setattr(
        "nybble.backends.torch.ops.kernels.float_product.choose_tile", lambda *_: tiles.Tile(32, 32, 2, 4, 1)
    )
    x = normal(40, linear.in_features)
    assert_close(linear(x), x.double() @ linear.decode(F32).double().t(), ROUNDING[F32])


@pytest.mark.parametrize("name", EIGHT_CASES)
def test_products_of_eight_bits(name: str, monkeypatch) -> None:
    tensor, activations = EIGHT_CASES[name]
    linear = pack_linear(tensor, DEVICE, F32, activations=activations)
    weight = torch.from_numpy(tensor.to_float32()).to(DEVICE)
    assert_close(linear.decode(F32), weight, 1e-6, name)
    for m in (1, 18):
        x = normal(m, linear.in_features)
        x[0, 3], x[-1, 140] = 30.0, -11.0  # outliers
        monkeypatch.setenv("NYBBLE_TORCH_OPS", "torch")
        reference = linear(x)
        monkeypatch.setenv("NYBBLE_TORCH_OPS", "triton")
        assert_close(linear(x), reference.double(), ROUNDING[F32], (name, m))
        error = (reference.double() - x.double() @ weight.double().t()).abs()
        assert (error <= rounding_bound(x, weight, linear) + 1e-4 * reference.abs().max()).all(), (name, m)


def rounding_bound(x, weight, linear) -> torch.Tensor:
    """What rounding the activations can cost at most: half a step of int8, or a sixteenth of each number of float8."""
    if linear.weight.dtype == torch.int8:
        quantised = x.masked_fill(x.abs() >= linear.threshold, 0.0) if linear.threshold else x
        half_steps = (quantised.abs().amax(1, keepdim=True) / 254).expand_as(x)
    else:
        half_steps = x.abs() / 16 + x.abs().amax(1, keepdim=True) / 448 * 2**-10
    return half_steps.double() @ weight.abs().double().t()


def test_outliers_cost_their_token_nothing(monkeypatch) -> None:
    with_kernels(monkeypatch)
    tensor, _ = EIGHT_CASES["LLM.int8"]
    linear = pack_linear(tensor, DEVICE, F32)
    x = normal(3, linear.in_features).clamp(-4, 4)
    alone = linear(x[1:2])
    x[0, 7] = 1000.0
    assert_close(linear(x)[1:2], alone.double(), 1e-6)
    wanted = x.double() @ linear.decode(F32).double().t()
    assert_close(linear(x)[0], wanted[0], 1e-3)  # steps of 4 / 127 in 299 inputs, beside 1000


def test_bias_shapes_and_no_tokens(monkeypatch) -> None:
    with_kernels(monkeypatch)
    linear = pack_linear(FLOAT_CASES["W4 g32"], DEVICE, F32)
    x, bias = normal(2, 3, 160), normal(ROWS)
    wanted = x.double() @ linear.decode(F32).double().t() + bias.double()
    assert_close(linear(x, bias), wanted, ROUNDING[F32])
    assert linear(x[:0]).shape == (0, 3, ROWS)
    with pytest.raises(ConfigError, match="37 x 160 cannot multiply rows of 7 values"):
        linear(normal(1, 7))


def test_strided_activations(monkeypatch) -> None:
    with_kernels(monkeypatch)
    linear = pack_linear(FLOAT_CASES["W4 g32"], DEVICE, F32)
    x = normal(3, 400)[:, 100:260]
    assert_close(linear(x), x.double() @ linear.decode(F32).double().t(), ROUNDING[F32])


def test_what_has_no_kernel_is_kept_as_floats_and_said(caplog) -> None:
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng()
    scattered = GroupedInt(
        4, 48, rng.integers(0, 16, (3, 96), dtype=np.uint8), rng.random((3, 2)).astype(np.float16), None,
        np.array([0] * 40 + [1] * 56, np.int32),
    )  # fmt: skip
    linear = pack_linear(packed(scattered), DEVICE, BF16)
    assert isinstance(linear, low_bit.DenseLinear) and linear.weight.dtype == BF16
    assert "layers.0.ffn.up is U8, which has no GPU kernel: kept as torch.bfloat16" in caplog.text


def test_activations_can_stay_floats() -> None:
    tensor, _ = EIGHT_CASES["LLM.int8"]
    linear = pack_linear(tensor, DEVICE, F32, activations="float")
    x = normal(2, linear.in_features)
    assert_close(linear(x), x.double() @ torch.from_numpy(tensor.to_float32()).to(DEVICE).double().t(), ROUNDING[F32])
    with pytest.raises(ConfigError, match="activations must be one of auto, float, float8, not 'int4'"):
        pack_linear(tensor, DEVICE, F32, activations="int4")


def test_only_matrices() -> None:
    tensor = blocks("Q8_0", 1, 64)
    flat = type(tensor)("final_norm", (64,), tensor.format, tensor.data)
    with pytest.raises(ConfigError, match=r"final_norm has the shape \[64\]"):
        pack_linear(flat, DEVICE, F32)


def test_tiles_are_remembered_and_damaged_files_ignored(tmp_path) -> None:
    path = tmp_path / "tiles" / "gpu.json"
    file = tuning.TileFile(path)
    assert file.tiles == {}
    file.add("a", tiles.Tile(16, 64, 4, 4, 3))
    other = tuning.TileFile(path)
    other.add("b", tiles.Tile(64, 64, 1, 4, 3))
    file.add("c", tiles.Tile(16, 32, 1, 4, 3))  # keeps what another process wrote
    assert set(tuning.TileFile(path).tiles) == {"a", "b", "c"}
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]
    content = json.loads(path.read_text())
    for damaged in (
        "{",
        "[]",
        json.dumps(content | {"version": "0"}),
        json.dumps(content | {"tiles": {"a": [16, 64]}}),
        json.dumps(content | {"tiles": {"a": [16, 63, 1, 4, 3]}}),
        json.dumps(content | {"tiles": {"a": [1 << 40] * 5}}),
    ):
        path.write_text(damaged)
        assert tuning.TileFile(path).tiles == {}


def test_a_disk_that_refuses_costs_a_warning(tmp_path, caplog) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    file = tuning.TileFile(blocked / "gpu.json")
    file.add("a", tiles.Tile(16, 64, 4, 4, 3))
    assert file.tiles["a"].rows == 64
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize("m", [1, 16, 17, 300, 5000])
def test_candidates_are_tiles(m: int) -> None:
    found = tiles.candidates(m, 4096, 11008, 132)
    assert found and len(set(found)) == len(found)
    assert all(tuning._tile(list(vars_of(tile))) == tile for tile in found)
    if m <= 16:
        assert all(tiles.few_tokens(tile) for tile in found)


def vars_of(tile) -> tuple[int, ...]:
    return (tile.tokens, tile.rows, tile.splits, tile.warps, tile.stages)


def test_grouped_cases_differ() -> None:
    assert not np.array_equal(grouped(4, 32, 64, zeros=False).codes, grouped(4, 32, 64, zeros=False).codes)
