"""The kernels at the sizes of real models, against float64. tests/backends/torch has the small cases."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from backends.torch.low_bit_cases import blocks, eight_bit_cases, float_activation_cases  # noqa: E402
from backends.torch.op_cases import ROUNDING, Paged, assert_close, normal  # noqa: E402
from native.sampling_reference import model, random_logits  # noqa: E402
from nybble.backends.cpu import sampling as native  # noqa: E402
from nybble.backends.cpu.step import SampleRow  # noqa: E402
from nybble.backends.torch import ops  # noqa: E402
from nybble.backends.torch.flash import flash_attention  # noqa: E402
from nybble.backends.torch.ops import reference  # noqa: E402

pytestmark = pytest.mark.kernels
F16, BF16, INT8, FP8 = torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def kernels(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("NYBBLE_TORCH_OPS", "triton")
    monkeypatch.setenv("NYBBLE_HOME", str(tmp_path))  # tiles are tried anew


def definition(q, k, v, window, softcap):
    """[tokens, heads, width] of one sequence, causal, in float64."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    seen = reference.visible(len(q), len(k), window, q.device)
    return torch.einsum("hqk,khd->qhd", torch.softmax(s.masked_fill(~seen, float("-inf")), -1), v)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (300, 30.0)])
def test_flash_attention(width: int, dtype, window, softcap) -> None:
    inputs = [normal(1000, heads, width, dtype=dtype).requires_grad_() for heads in (8, 2, 2)]
    d_out = normal(1000, 8, width, dtype=dtype)
    out = flash_attention(*(x[None] for x in inputs), window=window, softcap=softcap)[0]
    grads = torch.autograd.grad(out, inputs, d_out)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    wanted = definition(*doubles, window, softcap)
    wanted_grads = torch.autograd.grad(wanted, doubles, d_out.double())
    assert_close(out.detach(), wanted.detach(), 2 * ROUNDING[dtype])
    for found, want in zip(grads, wanted_grads, strict=True):
        assert (found.double() - want).norm() <= 2 * ROUNDING[dtype] * want.norm()


@pytest.mark.parametrize("cache", [BF16, INT8, FP8])
@pytest.mark.parametrize("heads", [(32, 8), (14, 2), (16, 1)])
@pytest.mark.parametrize("lengths", [[(1, 4000), (1, 17)], [(700, 1500), (1, 90)], [(1, 3000)] * 3 + [(130, 130)]])
def test_paged_attention(lengths, heads, cache) -> None:
    paged = Paged(lengths, heads, 128, dtype=BF16, cache=cache)
    for one, scale, x in zip(paged.caches, paged.scales, (paged.k, paged.v), strict=True):
        reference.store(x, one, scale, torch.arange(len(x), device=x.device))
    scales = {"k_scale": paged.scales[0], "v_scale": paged.scales[1]}
    options = {"sm_scale": 0.09, "window": 1000, "softcap": None, **scales}
    decodes = 3 if len(lengths) == 4 else 0
    out = ops.paged_attention(*paged.arrays(), **options, max_q_len=paged.max_q_len, num_decodes=decodes)
    assert_close(out, reference.paged_attention(*paged.doubles(), **options), 2 * ROUNDING[BF16])


CASES = dict(float_activation_cases())
BLOCKS = {f"{name} 4096": blocks(name, 512, 4096) for name in ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")}


@pytest.mark.parametrize("m", [1, 7, 16, 33, 600])
@pytest.mark.parametrize("name", [*CASES, *BLOCKS])
def test_products_of_floats(name: str, m: int) -> None:
    tensor = (CASES | BLOCKS)[name]
    linear = ops.pack_linear(tensor, "cuda", BF16)
    x = normal(m, linear.in_features, dtype=BF16)
    assert_close(linear(x), x.double() @ linear.decode(torch.float32).double().t(), 2 * ROUNDING[BF16], (name, m))


@pytest.mark.parametrize("m", [1, 16, 40])
@pytest.mark.parametrize(("name", "tensor", "activations"), list(eight_bit_cases()))
def test_products_of_eight_bits(name: str, tensor, activations: str, m: int, monkeypatch) -> None:
    if name.startswith("FP8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8 products")
    linear = ops.pack_linear(tensor, "cuda", BF16, activations=activations)
    x = normal(m, linear.in_features, dtype=BF16)
    x[0, 3] = 30.0
    found = linear(x)
    monkeypatch.setenv("NYBBLE_TORCH_OPS", "torch")
    assert_close(found, linear(x).double(), 2 * ROUNDING[BF16], name)


def test_the_same_tokens_as_the_cpu() -> None:
    vocab = 50000
    logits = random_logits(64, vocab, 3)
    rng = np.random.default_rng()
    rows = [
        SampleRow(
            temperature=float(rng.choice([0, 0.8, 1.3])), top_k=int(rng.choice([0, 40, 5000])),
            top_p=float(rng.choice([1.0, 0.9])), min_p=float(rng.choice([0, 0.05])), seed=int(rng.integers(1 << 40)),
            position=i, logprobs=4,
        )
        for i in range(64)
    ]  # fmt: skip
    wanted = native.sample(model(vocab), logits, rows)
    found = ops.sample(torch.from_numpy(logits).cuda(), rows)
    # A number drawn within rounding of a border may fall on its other side.
    assert sum(a.token_id == b.token_id for a, b in zip(found, wanted, strict=True)) >= 63


def test_a_graph_holds_a_step() -> None:
    """Nothing waits for the device, so attention and products can be replayed."""
    paged = Paged([(1, 500), (1, 90)], (8, 2), 64, dtype=BF16)
    linear = ops.pack_linear(CASES["W4 g128"], "cuda", BF16)
    x = normal(2, linear.in_features, dtype=BF16)

    def step():
        out = ops.paged_attention(*paged.arrays(), sm_scale=0.1, max_q_len=1)
        return out, linear(x)

    step()  # compiled and tuned
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    x.copy_(normal(2, linear.in_features, dtype=BF16))
    paged.q.copy_(normal(*paged.q.shape, dtype=BF16))
    graph.replay()
    for one, other in zip(held, step(), strict=True):
        assert torch.equal(one, other)
