"""FlashAttention against its definition in float64, both directions: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nybble.core.errors import ConfigError

flash = pytest.importorskip("nybble.backends.torch.flash", exc_type=ImportError)

pytestmark = pytest.mark.kernels
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attention(q, k, v, *, causal=True, scale=None, window=None, softcap=None):
    """One sequence, [tokens, heads, width], as the formula has it."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    s = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    row = torch.arange(len(q), device=q.device)[:, None] + len(k) - len(q)
    column = torch.arange(len(k), device=q.device)[None, :]
    seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device)
    if causal:
        seen &= column <= row
    if window is not None:
        seen &= column > row - window
    p = torch.softmax(s.masked_fill(~seen, float("-inf")), dim=-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", p, v)


def random(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    numbers = np.random.default_rng(seed + sum(shape)).standard_normal(shape)
    return torch.tensor(numbers).to(DEVICE, dtype)


def gradients(function, inputs, d_out):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    return out.detach(), torch.autograd.grad(out, inputs, d_out)


def check(lengths, heads, width, dtype=torch.float32, tolerance=2e-5, **options) -> None:
    """lengths: (queries, keys) of each sequence."""
    kv_heads = heads[1]
    total_q, total_k = (sum(pair[i] for pair in lengths) for i in (0, 1))
    q = random(total_q, heads[0], width, dtype=dtype)
    k, v = (random(total_k, kv_heads, width, dtype=dtype, seed=seed) for seed in (1, 2))
    d_out = random(total_q, heads[0], width, dtype=dtype, seed=3)
    cu = [
        torch.tensor(np.cumsum([0, *(pair[i] for pair in lengths)]), dtype=torch.int32, device=DEVICE) for i in (0, 1)
    ]
    longest = [max((pair[i] for pair in lengths), default=0) for i in (0, 1)]

    def ours(q, k, v):
        return flash.flash_attention(
            q, k, v, cu_seqlens_q=cu[0], cu_seqlens_k=cu[1], max_seqlen_q=longest[0], max_seqlen_k=longest[1], **options
        )

    def definition(q, k, v):
        parts = [
            attention(q[cu[0][i] : cu[0][i + 1]], k[cu[1][i] : cu[1][i + 1]], v[cu[1][i] : cu[1][i + 1]], **options)
            for i in range(len(lengths))
        ]
        return torch.cat(parts)

    out, grads = gradients(ours, (q, k, v), d_out)
    expected, expected_grads = gradients(definition, (q.double(), k.double(), v.double()), d_out.double())
    assert out.dtype == dtype
    for name, actual, want in zip(("out", "dq", "dk", "dv"), (out, *grads), (expected, *expected_grads), strict=True):
        error = (actual.double() - want).abs().max().item() if want.numel() else 0.0
        assert error <= tolerance * max(1.0, want.abs().max().item()), (name, error)


@pytest.mark.parametrize("width", [16, 64, 96, 128, 256])
def test_widths(width: int) -> None:
    check([(37, 37)], (2, 1), width)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "lengths", [[(1, 1)], [(16, 16)], [(33, 33), (5, 5), (1, 1)], [(3, 40), (17, 18)], [(1, 50), (20, 20)]]
)
def test_lengths(lengths, causal: bool) -> None:
    check(lengths, (4, 2), 16, causal=causal)


def test_more_queries_than_keys() -> None:
    """The first queries see nothing: their output is zero, and so is their gradient."""
    check([(20, 7)], (1, 1), 16)


@pytest.mark.parametrize("window", [1, 5, 16, 40, 1000])
def test_windows(window: int) -> None:
    check([(70, 70), (9, 45)], (2, 2), 16, window=window)


def test_softcap_and_scale() -> None:
    check([(41, 41)], (2, 1), 32, softcap=1.5, scale=0.9)
    check([(41, 41)], (2, 1), 32, softcap=30.0, window=7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Scores and sums are float32; probabilities are rounded to the type, as every tensor is."""
    check([(50, 50), (7, 30)], (2, 1), 64, dtype=dtype, tolerance=tolerance)


def test_gradients_are_those_of_differences() -> None:
    """The gradient that is computed, against how the loss changes when one number does."""
    shapes = [(7, 2, 16), (9, 1, 16), (9, 1, 16)]
    inputs = [random(*shape, seed=i).double() for i, shape in enumerate(shapes)]
    weight = random(7, 2, 16, seed=9).double()
    options = {"causal": True, "window": 5, "softcap": 3.0}
    _, grads = gradients(
        lambda q, k, v: flash.flash_attention(q[None], k[None], v[None], **options)[0],
        [x.float() for x in inputs], weight.float(),
    )  # fmt: skip

    def loss(index: int, moved: torch.Tensor) -> torch.Tensor:
        return (attention(*[moved if i == index else x for i, x in enumerate(inputs)], **options) * weight).sum()

    for index, grad in enumerate(grads):
        direction = random(*shapes[index], seed=20 + index).double()
        slope = (loss(index, inputs[index] + 1e-5 * direction) - loss(index, inputs[index] - 1e-5 * direction)) / 2e-5
        assert abs((grad.double() * direction).sum() - slope) < 1e-4 * max(1.0, abs(slope))


def test_large_scores_do_not_overflow() -> None:
    q = random(40, 1, 16) * 100
    out = flash.flash_attention(q[None], q[None], q[None])
    want = attention(q.double(), q.double(), q.double())
    assert torch.isfinite(out).all()
    assert (out[0].double() - want).abs().max() < 1e-3


def test_a_batch_and_strides() -> None:
    packed = random(2, 21, 3, 2, 16)  # q, k and v of one tensor, as a fused projection gives them
    q, k, v = (packed[:, :, i] for i in range(3))
    out = flash.flash_attention(q, k, v)
    for one in range(2):
        want = attention(*(x[one].double() for x in (q, k, v)))
        assert (out[one].double() - want).abs().max() < 1e-5


def test_equal_inputs_give_equal_bits() -> None:
    x = [random(45, 2, 16, seed=i) for i in range(4)]
    first, second = (
        gradients(lambda q, k, v: flash.flash_attention(q[None], k[None], v[None])[0], x[:3], x[3]) for _ in "ab"
    )
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((4, 3, 16), (4, 2, 16)), {}, "multiple of 2 kv heads"),
        (((4, 2, 20), (4, 2, 20)), {}, "head_dim 20"),
        (((4, 2, 16), (4, 2, 32)), {}, "do not fit together"),
        (((4, 2, 16), (4, 2, 16)), {"window": 3, "causal": False}, "must be at least 1 and causal"),
        (((4, 2, 16), (4, 2, 16)), {"softcap": -1.0}, "softcap must be positive"),
    ],
)
def test_refused(shapes, options, message) -> None:
    q, k = (torch.zeros(1, *shape, device=DEVICE) for shape in shapes)
    with pytest.raises(ConfigError, match=message):
        flash.flash_attention(q, k, k, **options)


@pytest.mark.parametrize("limit", [232448, 166912, 101376, 49152])
def test_tiles_fit_smaller_gpus(limit: int, monkeypatch) -> None:
    tiles = pytest.importorskip("nybble.backends.torch.flash.tiles")
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    monkeypatch.setattr(tiles, "shared_bytes", lambda _: limit)
    for width in (64, 96, 128, 256):
        q = torch.zeros(1, 1, width, dtype=torch.bfloat16)
        forward, backward = tiles.forward_tiles(q), tiles.backward_tiles(q)
        padded = 256 if width == 256 else 64 if width == 64 else 128
        assert 2 * padded * (forward.queries + 2 * forward.keys * forward.stages) <= limit
        assert 2 * padded * 2 * (backward.queries + backward.keys * backward.stages) <= limit
        assert min(forward.queries, forward.keys, backward.queries, backward.keys) >= 16
