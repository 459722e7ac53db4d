"""One call per kernel and variant, at the shapes of a Llama-3-8B, for compile_kernels.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from random_codes import MATRICES

from nybble.backends.torch.flash import flash_attention
from nybble.backends.torch.ops import kernels
from nybble.backends.torch.ops.kernels.float_product import run_product
from nybble.backends.torch.ops.kernels.tiles import candidates
from nybble.backends.torch.ops.low_bit.coded import Codes
from nybble.backends.torch.ops.sampling.columns import Columns

HEADS, KV_HEADS, WIDTH, HIDDEN, FFN = 32, 8, 128, 4096, 14336
BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn


def _flash(width: int, dtype: torch.dtype, **options: object) -> None:
    q, k, v = (torch.empty(1, 256, heads, width, dtype=dtype).requires_grad_() for heads in (4, 2, 2))
    out = flash_attention(q, k, v, **options)
    torch.autograd.grad(out, (q, k, v), torch.empty_like(out))


def _cache(kind: torch.dtype, width: int = WIDTH) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    caches = [torch.empty(512, 16, KV_HEADS, width, dtype=BF16).to(kind) for _ in "kv"]
    scales = [torch.empty(512, 16, KV_HEADS) if kind in (INT8, FP8) else None for _ in "kv"]
    return caches, scales


def _paged(q_len: int, kind: torch.dtype = BF16, width: int = WIDTH, **options: object) -> None:
    caches, scales = _cache(kind, width)
    kernels.paged_attention(
        torch.empty(2 * q_len, HEADS, width, dtype=BF16), *caches, torch.empty(2, 256, dtype=torch.int32),
        torch.empty(3, dtype=torch.int32), torch.empty(2, dtype=torch.int32),
        **{"sm_scale": 0.1, "window": None, "softcap": None, "k_scale": scales[0], "v_scale": scales[1],
           "max_q_len": q_len, "num_decodes": 0} | options,
    )  # fmt: skip


def _rope(kind: torch.dtype, interleaved: bool, norms: bool) -> None:
    caches, scales = _cache(kind)
    q, k, v = (torch.empty(4, heads, WIDTH, dtype=BF16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    angles, slots, norm = torch.empty(4, WIDTH // 2), torch.empty(4, dtype=torch.int32), torch.empty(WIDTH)
    weights = (norm, norm) if norms else (None, None)
    kernels.rope_store_kv(q, k, v, angles, angles, WIDTH, interleaved, *caches, slots, *weights, 1e-5, *scales)
    kernels.store_kv(k, v, *caches, slots, *scales)


def _norm() -> None:
    x = torch.empty(4, HIDDEN, dtype=BF16)
    kernels.rms_norm(x, torch.empty(HIDDEN), 1e-5, x)
    kernels.rms_norm(x, torch.empty(HIDDEN), 1e-5, None)


def _gated() -> None:
    gate = torch.empty(4, FFN, dtype=BF16)
    kernels.gated_activation(gate, gate, "silu")
    kernels.gated_activation(gate, gate, "gelu_tanh")


def _product(make: Callable[[int, int, str], Codes], tokens: int) -> None:
    codes = make(HIDDEN, HIDDEN, "cpu")
    x = torch.empty(tokens, HIDDEN, dtype=BF16)
    tile = candidates(tokens, HIDDEN, HIDDEN, 132)[0]
    run_product(x, codes, tile)


def _eight(kind: torch.dtype, scales: int, tokens: int, threshold: float) -> None:
    x = torch.empty(tokens, HIDDEN, dtype=BF16)
    kernels.product8(x, torch.empty(HIDDEN, HIDDEN, dtype=BF16).to(kind), torch.empty(scales, HIDDEN), threshold)


def _draw() -> None:
    column = torch.empty(4)
    flags, top_k = torch.empty(4, dtype=torch.bool), torch.empty(4, dtype=torch.int32)
    columns = Columns(flags, column, top_k, column, column, column.double(), all_greedy=False)
    kernels.draw(torch.empty(4, 128256), columns)


def _cases() -> Iterator[tuple[str, Callable[[], object]]]:
    yield "norm", _norm
    yield "gated activation", _gated
    yield "rope and store bf16", lambda: _rope(BF16, False, False)
    yield "rope and store int8, interleaved", lambda: _rope(INT8, True, False)
    yield "rope and store fp8, norms", lambda: _rope(FP8, False, True)
    for kind in (BF16, INT8, FP8):
        yield f"paged decode {kind}", lambda kind=kind: _paged(1, kind)
        yield f"paged prefill {kind}", lambda kind=kind: _paged(512, kind)
    yield "paged window and cap", lambda: [_paged(n, window=1024, softcap=50.0) for n in (1, 512)]
    for width in (64, 96, 256):
        yield f"paged width {width}", lambda width=width: [_paged(n, width=width) for n in (1, 512)]
    yield "draw", _draw
    for name, make in MATRICES.items():
        for tokens in (16, 64, 1024):
            yield f"product {name} M={tokens}", partial(_product, make, tokens)
    for tokens in (16, 1024):
        yield f"product W8A8 M={tokens}", lambda tokens=tokens: _eight(INT8, 1, tokens, 0.0)
        yield f"product LLM.int8 M={tokens}", lambda tokens=tokens: _eight(INT8, 1, tokens, 6.0)
        yield f"product FP8xFP8 M={tokens}", lambda tokens=tokens: _eight(FP8, 1, tokens, 0.0)
        yield f"product FP8xFP8 blocks M={tokens}", lambda tokens=tokens: _eight(FP8, 32, tokens, 0.0)
    for width in (64, 96, 128, 256):
        yield f"flash width {width}", lambda width=width: _flash(width, BF16)
    yield "flash fp16", lambda: _flash(128, torch.float16)
    yield "flash f32", lambda: _flash(128, torch.float32)
    yield "flash window and cap", lambda: _flash(128, BF16, window=1024, softcap=30.0)
    yield "flash full", lambda: _flash(128, BF16, causal=False)


CASES: dict[str, Callable[[], object]] = dict(_cases())
