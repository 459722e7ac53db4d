"""Grids, GPTQ, AWQ and the codebooks as maths, against brute force, published values and each other."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.compress.awq.algorithm import search_clip, search_scale
from nybble.compress.bnb.algorithm import dynamic_code, nest_absmax, quantize_4bit, quantize_rows
from nybble.compress.calibration.stream import Moments
from nybble.compress.gptq.algorithm import GptqOptions, Order, gptq, inverse_factor, output_error, prepare
from nybble.compress.grids import Grid, find_params, round_to_nearest
from nybble.compress.rtn.float8 import quantize_float8
from nybble.quant.weights import FP4_VALUES, NF4_VALUES

pytestmark = pytest.mark.unit


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def problem(seed: int, rows: int = 24, inputs: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and H of inputs that depend on each other, some far larger than others."""
    x = random(seed, 4 * inputs, inputs) @ random(seed + 1, inputs, inputs) * torch.logspace(-1, 1, inputs)
    return random(seed + 2, rows, inputs) * 0.05, x.T @ x / len(x)


def decode(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, size: int) -> torch.Tensor:
    groups = codes.float().reshape(len(codes), -1, size)
    return ((groups - zero[..., None]) * scale[..., None]).reshape(codes.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_every_weight_goes_to_its_nearest_code(bits: int, symmetric: bool, search: bool) -> None:
    grid, weight = Grid(bits, 32, symmetric, search), random(0, 16, 64)
    codes, params = round_to_nearest(weight, grid)
    values = decode(codes, params.scale, params.zero, 32)
    every = (torch.arange(1 << bits)[:, None, None] - params.zero) * params.scale  # [codes, rows, groups]
    distance = (weight.reshape(16, 2, 32) - every[..., None]).abs().amin(0)
    torch.testing.assert_close((values - weight).abs().reshape(16, 2, 32), distance, atol=1e-6, rtol=0)
    assert torch.equal(params.scale, params.scale.half().float())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_full_range_holds_the_largest_weight(bits: int) -> None:
    weight = random(1, 8, 32)
    codes, params = round_to_nearest(weight, Grid(bits, -1))
    at = weight.abs().argmax(1)
    rows = torch.arange(8)
    assert (codes[rows, at] == 0).all()
    assert torch.allclose(decode(codes, params.scale, params.zero, 32)[rows, at], weight[rows, at], rtol=1e-3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_never_costs(symmetric: bool) -> None:
    weight, importance = random(2, 32, 128), random(3, 128).square()
    plain, best, weighted = (
        decode(c, p.scale, p.zero, 64)
        for c, p in (
            round_to_nearest(weight, Grid(3, 64, symmetric)),
            round_to_nearest(weight, Grid(3, 64, symmetric, search=True)),
            round_to_nearest(weight, Grid(3, 64, symmetric, search=True), importance),
        )
    )
    assert (best - weight).square().sum() < (plain - weight).square().sum()
    assert ((weighted - weight).square() * importance).sum() < ((best - weight).square() * importance).sum()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from([2, 3, 4, 8]), st.floats(-2, 2), st.integers(0, 1))
def test_zero_is_on_asymmetric_grids(seed: int, bits: int, shift: float, least: int) -> None:
    groups = random(seed, 4, 1, 16) + shift
    params = find_params(groups, Grid(bits, 16, False, least_zero=least))
    assert (params.zero >= least).all()
    assert (params.zero < 1 << bits).all()
    assert (params.zero == params.zero.round()).all()
    values = params.decode(params.codes(groups, (1 << bits) - 1))
    assert ((values - groups).abs() <= params.scale[..., None] * 1.01 + 1e-6).all()


def test_groups_of_zeros_and_of_one_value() -> None:
    weight = torch.zeros(3, 32)
    weight[1] = 5.0
    weight[2] = -5.0
    for symmetric in (True, False):
        codes, params = round_to_nearest(weight, Grid(4, 32, symmetric, search=True))
        assert torch.allclose(decode(codes, params.scale, params.zero, 32), weight, atol=0.01)


def test_float8_rounds_to_nearest() -> None:
    weight = random(4, 16, 32)
    found = quantize_float8(weight, torch.bfloat16)
    error = np.abs(found.decode() - weight.numpy())
    largest = weight.abs().amax(1, keepdim=True).numpy()
    assert (error <= np.maximum(np.abs(weight.numpy()) / 16, largest / 448 / 512) * 1.01).all()
    assert (np.abs(found.decode()).max(1) > 0.99 * largest[:, 0]).all()


# GPTQ


def by_hand(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, middle: int) -> torch.Tensor:
    """Optimal brain quantisation of each column in turn, with H inverted anew for what is left of it."""
    w = weight.double().clone()
    h = hessian.double()
    for i in range(w.shape[1]):
        inverse = torch.linalg.inv(h[i:, i:])
        q = ((w[:, i] / scale).round() + middle).clamp(0, 2 * middle - 1)
        error = (w[:, i] - (q - middle) * scale) / inverse[0, 0]
        w[:, i:] -= torch.outer(error, inverse[0])
    return w.float()


def test_gptq_is_optimal_brain_quantisation() -> None:
    weight, hessian = problem(0, rows=6, inputs=16)
    options = GptqOptions(Grid(4, -1), Order.NATURAL, damp_percent=0.01)
    found = gptq(weight, prepare(hessian, options), options)
    assert not found.fallback
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    expected = by_hand(weight, damped, found.params.scale[:, 0].double(), 8)
    torch.testing.assert_close(
        decode(found.codes, found.params.scale, found.params.zero, 16), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_no_worse_than_rounding(order: Order, bits: int, symmetric: bool) -> None:
    for seed in (0, 10):
        weight, hessian = problem(seed)
        options = GptqOptions(Grid(bits, 32, symmetric, search=True), order)
        found = gptq(weight, prepare(hessian, options), options)
        groups = torch.arange(64) // 32 if found.g_idx is None else found.g_idx
        values = (found.codes.float() - found.params.zero[:, groups]) * found.params.scale[:, groups]
        assert output_error(weight, values, hessian) == pytest.approx(found.error, rel=1e-4)
        assert found.error < found.rtn_error
        assert (found.g_idx is not None) == (order is Order.FULL and not found.fallback)


def test_a_matrix_that_cannot_be_inverted_gets_more_damping() -> None:
    x = random(5, 3, 64)  # of rank 3
    hessian = x.T @ x
    factor, damp = inverse_factor(hessian, 0.0)
    assert factor is not None
    assert damp > 0
    weight = random(6, 8, 64)
    options = GptqOptions(Grid(4, 32), damp_percent=0.0)
    assert gptq(weight, prepare(hessian, options), options).error <= output_error(
        weight, torch.zeros_like(weight), hessian
    )


def test_the_factor_is_that_of_the_inverse() -> None:
    x = random(8, 1200, 700)  # more inputs than a triangle inverted in one piece, and no power of two
    hessian = x.T @ x / len(x)
    factor, damp = inverse_factor(hessian, 0.05)
    assert factor is not None
    assert damp == 0.05
    assert (factor.tril(-1) == 0).all()
    damped = hessian.double() + 0.05 * float(hessian.diagonal().mean()) * torch.eye(700, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-4, atol=1e-5)


def test_moments_of_more_inputs_than_a_band_are_whole() -> None:
    moments = Moments.zeros(2100, full=True)
    parts = [random(9, 2, 10, 2100), random(10, 7, 2100)]
    for part in parts:
        moments.add(part)
    x = torch.cat([part.reshape(-1, 2100) for part in parts]).double()
    hessian = moments.hessian("a linear")
    torch.testing.assert_close(hessian, hessian.T)
    torch.testing.assert_close(hessian.double(), x.T @ x / 27, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.importance("a linear").double(), x.square().mean(0), rtol=1e-4, atol=1e-5)


def test_inputs_that_were_never_seen_are_rounded_to_nearest() -> None:
    weight, hessian = problem(7)
    hessian[5], hessian[:, 5] = 0, 0
    options = GptqOptions(Grid(8, -1), Order.NATURAL)
    found = gptq(weight, prepare(hessian, options), options)
    values = decode(found.codes, found.params.scale, found.params.zero, 64)
    assert ((values - weight)[:, 5].abs() <= found.params.scale[:, 0].abs() * 0.51).all()
    nothing = gptq(weight, prepare(torch.zeros(64, 64), options), options)
    assert nothing.fallback


# AWQ


def test_awq_is_no_worse_than_rounding() -> None:
    for seed, symmetric in itertools.product((0, 10, 20), (True, False)):
        weight, hessian = problem(seed)
        grid = Grid(4, 32, symmetric)
        mean_abs = hessian.diagonal().sqrt() * 0.8
        found = search_scale([weight[:8], weight[8:]], hessian, mean_abs, grid)
        assert found.error < found.rtn_error
        scaled, of_scaled = weight * found.scale, hessian / torch.outer(found.scale, found.scale)
        clipped = search_clip(scaled, of_scaled, grid)
        errors = []
        for one in (scaled, clipped):
            codes, params = round_to_nearest(one, grid)
            errors.append(output_error(scaled, decode(codes, params.scale, params.zero, 32), of_scaled))
        assert errors[0] == pytest.approx(found.error, rel=1e-3)
        assert (clipped.abs() <= scaled.abs()).all()


def test_awq_without_activations_changes_nothing() -> None:
    weight, _ = problem(0)
    assert torch.equal(search_scale([weight], torch.zeros(64, 64), torch.zeros(64), Grid(4, 32)).scale, torch.ones(64))


# bitsandbytes


def test_nf4_are_quantiles_of_a_normal_distribution() -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
    up = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    down = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((up, down, torch.zeros(1))).sort().values
    np.testing.assert_allclose(NF4_VALUES, values / values.max(), atol=1e-6)


def test_the_table_of_fp4_has_no_negative_zero() -> None:
    """It is written into every file, where bitsandbytes has two positive ones."""
    assert np.flatnonzero(FP4_VALUES == 0).tolist() == [0, 8]
    assert not np.signbit(FP4_VALUES[[0, 8]]).any()


def test_what_bitsandbytes_gives() -> None:
    """Digests of what bitsandbytes 0.50.2 gives on a CPU for the same weights: codes, scales, nested codes."""
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((96, 200)).astype(np.float32) * np.float32(0.05))
    found = {}
    for table in ("nf4", "fp4"):
        packed = quantize_4bit(weight, table, 64)  # type: ignore[arg-type]
        nested = nest_absmax(packed.absmax)
        flat = packed.codes.reshape(-1)
        found[table] = [
            digest((flat[0::2] << 4) | flat[1::2]),
            digest(packed.absmax),
            digest(nested.codes),
            digest(nested.scales),
        ]
    rows = quantize_rows(weight, 6.0)
    found["int8"] = [digest(rows.codes), digest(rows.absmax)]
    found["code"] = [digest(dynamic_code())]
    assert found == EXPECTED


def digest(array: np.ndarray) -> str:  # type: ignore[type-arg]
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


EXPECTED = {
    "nf4": ["0fc0de853ad15c06", "dcd38631d4eb5437", "a21abba49196e65f", "43b5d45045de6539"],
    "fp4": ["21cb34fa4c30d36c", "dcd38631d4eb5437", "a21abba49196e65f", "43b5d45045de6539"],
    "int8": ["70e240addee0ea77", "5443ea6242b462fb"],
    "code": ["e732639a65f497b4"],
}
