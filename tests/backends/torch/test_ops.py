"""The kernels of the torch backend against their definitions in float64: on a GPU, or under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from backends.torch.op_cases import DEVICE, ROUNDING, Paged, assert_close, fresh, normal
from nybble.backends.torch import ops
from nybble.backends.torch.ops import reference
from nybble.core.errors import ConfigError

pytest.importorskip("triton")
pytestmark = pytest.mark.kernels
F32, F16, BF16, INT8, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def kernels(monkeypatch) -> None:
    monkeypatch.setenv("NYBBLE_TORCH_OPS", "triton")


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (2, 1000)])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    weight = normal(shape[1])
    wanted, _ = reference.rms_norm(x.double(), weight.double(), 1e-5)
    assert_close(ops.rms_norm(x, weight, 1e-5), wanted, ROUNDING[dtype])
    normed, total = ops.rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, x + residual)
    wanted, _ = reference.rms_norm(total.double(), weight.double(), 1e-5)
    assert_close(normed, wanted, ROUNDING[dtype])


def test_rms_norm_of_strided_rows_and_of_none() -> None:
    x = normal(4, 30)[:, 3:20]
    weight = normal(17)
    assert_close(ops.rms_norm(x, weight, 1e-6), reference.rms_norm(x.double(), weight.double(), 1e-6)[0], 2e-6)
    assert ops.rms_norm(x[:0], weight, 1e-6).shape == (0, 17)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gated_activation(kind: str, dtype: torch.dtype) -> None:
    both = normal(3, 2 * 1500, dtype=dtype) * 4
    gate, up = both[:, :1500], both[:, 1500:]
    gate[0, 0], gate[0, 1] = 80.0, -80.0
    wanted = reference.gated_activation(gate.double(), up.double(), kind)
    assert_close(ops.gated_activation(gate, up, kind), wanted, ROUNDING[dtype])


@pytest.mark.parametrize("cache", [F32, F16, INT8, FP8])
def test_store_skips_and_fills_slots(cache: torch.dtype) -> None:
    made, wanted = (Paged([(1, 30)], (2, 2), 24, cache=cache, block_size=8) for _ in "ab")
    k, v = normal(5, 2, 24), normal(5, 2, 24)
    k[3] = 0.0
    slots = torch.tensor([17, 0, -1, 9, 31], device=DEVICE)
    ops.store_kv(k, v, *made.caches, slots, *made.scales)
    for part, x in enumerate((k, v)):
        reference.store(x, wanted.caches[part], wanted.scales[part], slots)
        assert torch.equal(made.caches[part].float(), wanted.caches[part].float())
        if made.scales[part] is not None:
            assert torch.equal(made.scales[part], wanted.scales[part])
    assert (made.caches[0].float().flatten(0, 1)[[1, 2, 16]] == 0).all()


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotary"), [(16, 16), (24, 10), (96, 96)])
def test_rope_and_store(width: int, rotary: int, interleaved: bool, norms: bool) -> None:
    paged = Paged([(1, 20)], (6, 2), width)
    q, k, v = normal(4, 6, width), normal(4, 2, width), normal(4, 2, width)
    angles = normal(4, rotary // 2)
    cos, sin = angles.cos() * 1.1, angles.sin() * 1.1
    slots = torch.tensor([3, -1, 30, 11], dtype=torch.int32, device=DEVICE)
    weights = {"q_norm": normal(width), "k_norm": normal(width)} if norms else {}
    out = ops.rope_store_kv(q, k, v, cos, sin, rotary, interleaved, *paged.caches, slots, eps=1e-5, **weights)
    caches = [torch.zeros_like(cache).double() for cache in paged.caches]
    doubles = [x.double() for x in (q, k, v, cos, sin)]
    norm = [weights[name].double() if norms else None for name in ("q_norm", "k_norm")]
    wanted = reference.rope_store_kv(*doubles, rotary, interleaved, *caches, slots, *norm, 1e-5, None, None)
    assert_close(out, wanted, 4e-6)
    for made, want in zip(paged.caches, caches, strict=True):
        assert_close(made, want, 4e-6)


def check_attention(paged: Paged, tolerance: float, num_decodes: int = 0, **options: object) -> None:
    for cache, scale, x in zip(paged.caches, paged.scales, (paged.k, paged.v), strict=True):
        reference.store(x, cache, scale, torch.arange(len(x), device=DEVICE))
    options = {"sm_scale": 0.3, "window": None, "softcap": None} | options
    scales = {"k_scale": paged.scales[0], "v_scale": paged.scales[1]}
    out = ops.paged_attention(*paged.arrays(), **options, **scales, max_q_len=paged.max_q_len, num_decodes=num_decodes)
    wanted = reference.paged_attention(*paged.doubles(), **options, **scales)
    assert out.dtype == paged.q.dtype
    assert_close(out, wanted, tolerance, options)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (7, 1)])
def test_decode(heads: tuple[int, int]) -> None:
    check_attention(Paged([(1, 1), (1, 37), (1, 130)], heads, 24), 4e-6)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("lengths", [[(20, 20)], [(7, 40), (17, 17), (1, 33)], [(3, 3), (33, 70)]])
def test_chunks_of_prompts(lengths: list[tuple[int, int]], heads: tuple[int, int]) -> None:
    check_attention(Paged(lengths, heads, 16), 4e-6)


def test_decodes_beside_chunks() -> None:
    check_attention(Paged([(1, 90), (1, 5), (19, 50), (1, 3)], (4, 2), 16), 4e-6, num_decodes=2)


@pytest.mark.parametrize("window", [1, 13, 32, 500])
def test_windows_and_softcap(window: int) -> None:
    check_attention(Paged([(1, 75), (1, 20)], (2, 1), 16), 4e-6, window=window)
    check_attention(Paged([(21, 60), (9, 9)], (2, 1), 16), 4e-6, window=window, softcap=2.0)


@pytest.mark.parametrize("cache", [INT8, FP8])
@pytest.mark.parametrize("lengths", [[(1, 70), (1, 9)], [(18, 40)]])
def test_quantised_caches(lengths: list[tuple[int, int]], cache: torch.dtype) -> None:
    check_attention(Paged(lengths, (4, 2), 32, cache=cache), 4e-6)


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_half_precision_attention(dtype: torch.dtype) -> None:
    check_attention(Paged([(1, 70), (18, 40)], (4, 2), 64, dtype=dtype), 3 * ROUNDING[dtype], num_decodes=1)


def test_other_blocks_and_sequences_without_keys() -> None:
    paged = Paged([(1, 0), (1, 50)], (2, 2), 16, block_size=32)
    check_attention(paged, 4e-6)
    assert (ops.paged_attention(*paged.arrays(), sm_scale=1.0, max_q_len=1)[0] == 0).all()


def test_what_does_not_fit_is_refused() -> None:
    paged = Paged([(1, 5)], (3, 1), 16)
    q, k_cache, v_cache, tables, cu, lens = paged.arrays()
    with pytest.raises(ConfigError, match="2 heads are not a multiple of 4 kv heads"):
        wide = torch.zeros(2, 16, 4, 16, device=DEVICE)
        ops.paged_attention(q[:, :2], wide, wide, tables, cu, lens, sm_scale=1.0, max_q_len=1)
    with pytest.raises(ConfigError, match="kv_lens must be int32"):
        ops.paged_attention(q, k_cache, v_cache, tables, cu, lens.long(), sm_scale=1.0, max_q_len=1)
    with pytest.raises(ConfigError, match=r"needs contiguous scales \[3, 16, 1\] of torch.float32, not none"):
        ops.paged_attention(q, k_cache.to(INT8), v_cache.to(INT8), tables, cu, lens, sm_scale=1.0, max_q_len=1)
    with pytest.raises(ConfigError, match=r"no kernel for head_dim 320 .* set NYBBLE_TORCH_OPS=torch"):
        big = torch.zeros(1, 16, 1, 320, device=DEVICE)
        ops.paged_attention(normal(1, 3, 320), big, big, tables, cu, lens, sm_scale=1.0, max_q_len=1)
    with pytest.raises(ConfigError, match="rotary_dim 7 must be even and at most 16"):
        angles = normal(1, 3)
        k, slots = normal(1, 1, 16), torch.zeros(1, dtype=torch.int32, device=DEVICE)
        ops.rope_store_kv(q, k, k, angles, angles, 7, False, k_cache, v_cache, slots)
    with pytest.raises(ConfigError, match="must be silu or gelu_tanh"):
        ops.gated_activation(q, q, "relu")
    with pytest.raises(ConfigError, match="weight"):
        ops.rms_norm(normal(2, 5), normal(4), 1e-5)


def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch) -> None:
    x = torch.zeros(2, 4)
    monkeypatch.setattr("nybble.backends.torch.ops.kernels.interpreted", lambda: False)
    with pytest.raises(ConfigError, match="set TRITON_INTERPRET=1"):
        ops.rms_norm(x, torch.ones(4), 1e-5)
    monkeypatch.setenv("NYBBLE_TORCH_OPS", "auto")
    assert ops.rms_norm(x, torch.ones(4), 1e-5).shape == (2, 4)


def test_fresh_numbers_differ() -> None:
    assert not torch.equal(torch.rand(3, generator=fresh()), torch.rand(3, generator=fresh()))
