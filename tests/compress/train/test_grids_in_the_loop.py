"""Grids in the loop: the file decodes to the values of the forward pass, and gradients are those of LSQ."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from nybble.compress.grids import Grid  # noqa: E402  # needs torch
from nybble.compress.qat.blocks import BlockGrid, encode  # noqa: E402
from nybble.compress.qat.integers import IntegerGrid, StoredFloats  # noqa: E402
from nybble.compress.qat.pack import LAYOUTS, unpack_scales  # noqa: E402
from nybble.compress.qat.rounding import round_groups, stored_as, whole_numbers  # noqa: E402
from nybble.quant.formats import FORMATS  # noqa: E402
from nybble.quant.reference import dequantize  # noqa: E402

pytestmark = [pytest.mark.unit]
ROWS, COLUMNS = 6, 512


def weights(seed: int = 0) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32) * 0.05
    values[0, :40] = 0  # a part without a scale
    values[1] *= 30
    return torch.from_numpy(values)


def moved(module: torch.nn.Module, seed: int = 1) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_blocks_decode_to_what_was_trained(name: str) -> None:
    weight, fmt = weights(), FORMATS[name]
    importance = np.random.default_rng(3).random(COLUMNS, dtype=np.float32) + 0.1
    grid = BlockGrid(encode(weight.numpy(), fmt, importance, threads=1, name="w"), fmt, (ROWS, COLUMNS))
    for step in range(3):
        used = grid(weight).detach()
        data = grid.export(weight)
        assert data.shape == (ROWS, fmt.row_bytes(COLUMNS))
        decoded = dequantize(fmt, data.reshape(-1)).reshape(ROWS, COLUMNS)
        assert (torch.from_numpy(decoded) == used).all()
        moved(grid, step)
        weight = weight + 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_training_starts_where_the_encoder_is(name: str) -> None:
    weight, fmt = weights(), FORMATS[name]
    data = encode(weight.numpy(), fmt, None, threads=1, name="w")
    grid = BlockGrid(data, fmt, (ROWS, COLUMNS))
    encoded = torch.from_numpy(dequantize(fmt, data.reshape(-1)).reshape(ROWS, COLUMNS))
    error = (encoded - weight).square().sum()
    # The encoder weighs errors, the loop takes the nearest code.
    assert (grid(weight) - weight).square().sum() <= error * (1 + 1e-6)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_scales_survive_a_round_trip(name: str) -> None:
    fmt = FORMATS[name]
    data = encode(weights().numpy(), fmt, None, threads=1, name="w")
    grid = BlockGrid(data, fmt, (ROWS, COLUMNS))
    again = grid.export(grid(weights()).detach())
    first, second = (unpack_scales(fmt, d.reshape(-1, fmt.block_bytes)) for d in (data, again))
    assert (first.d == second.d).all() and (first.scales == second.scales).all()
    if first.dmin is not None:
        assert (first.dmin == second.dmin).all() and (first.minima == second.minima).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.float16), (4, torch.float16), (2, torch.bfloat16)])
def test_integers_decode_to_what_was_trained(bits: int, dtype: torch.dtype, symmetric: bool) -> None:
    weight = weights()
    grid = IntegerGrid(weight, Grid(bits, 64, symmetric, search=bits < 8, scale_dtype=dtype))
    for step in range(3):
        packed = grid.export(weight)
        assert int(packed.codes.max()) < 1 << bits
        assert (torch.from_numpy(packed.decode()) == grid(weight)).all()
        moved(grid, step)


def test_gradients_are_those_of_lsq() -> None:
    """Against the formula written out with torch's own operations."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, 16, generator=generator)
    scale, offset = torch.rand(3, 4, generator=generator) * 0.3 + 0.1, torch.rand(3, 4, generator=generator)
    low, high = torch.tensor([0.0]), torch.tensor([7.0])
    seen = torch.randn(3, 4, 16, generator=generator)
    ours = [tensor.clone().requires_grad_() for tensor in (weight, scale, offset)]
    (round_groups(*ours, low, high) * seen).sum().backward()
    plain = [tensor.clone().requires_grad_() for tensor in (weight, scale, offset)]
    w, s, o = plain
    place = ((w + o[..., None]) / s[..., None]).clamp(0, 7)
    codes = place + (place.round() - place).detach()
    values = codes * s[..., None] - o[..., None]
    (values * seen).sum().backward()
    assert torch.allclose(round_groups(weight, scale, offset, low, high), values, atol=1e-6)
    for a, b in zip(ours, plain, strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, atol=1e-4)


def test_rounding_lets_gradients_through() -> None:
    values = torch.tensor([0.1, -3.7, 9.9], requires_grad=True)
    whole_numbers(values, 0, 5).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1, 0, 0]
    other = torch.tensor([1.0001, 1e9], requires_grad=True)
    kept = stored_as(other, torch.float16)
    assert kept.tolist() == [1.0, 65504.0]
    kept.sum().backward()
    assert other.grad is not None and other.grad.tolist() == [1, 1]


def test_norms_are_rounded_as_the_folder_keeps_them() -> None:
    values = torch.tensor([1.0003, 0.5])
    assert StoredFloats(torch.float16, plus_one=False)(values).tolist() == values.half().float().tolist()
    assert StoredFloats(torch.float16, plus_one=True)(values).tolist() == ((values - 1).half().float() + 1).tolist()
