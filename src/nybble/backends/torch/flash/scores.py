"""What the kernels of attention share: the scores of a tile, and which of them count.

A tile has rows (queries) and columns (keys) of one sequence. With a causal mask the last query sees the last key, so
that queries may also be the end of a longer text. Scores are kept in base 2: exp2 is one instruction, exp is two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import narrow

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """From the exponential of a negative number, which cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def scores(products, scale, cap, HAS_CAP: tl.constexpr):
    """Base-2 scores of products q k, and the tanh that the cap took (the products where there is none)."""
    if HAS_CAP:
        squeezed = tanh(products * (scale / cap))
        return squeezed * (cap * LOG2_E), squeezed
    return products * (scale * LOG2_E), products


@triton.jit
def visible(rows, columns, num_queries, num_keys, window, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Whether the query of a row sees the key of a column; both are broadcast."""
    at = rows + (num_keys - num_queries)
    seen = (columns < num_keys) & (rows < num_queries)
    if CAUSAL:
        seen = seen & (columns <= at)
    if HAS_WINDOW:
        seen = seen & (columns > at - window)
    return seen


@triton.jit
def load_tile(base, at, count, stride, width, BLOCK_WIDTH: tl.constexpr):
    """[rows, BLOCK_WIDTH] at rows `at` of a matrix with `count` rows of `width`; zeros outside."""
    across = tl.arange(0, BLOCK_WIDTH)
    inside = (at < count)[:, None] & (across < width)[None, :]
    return tl.load(base + at[:, None] * stride + across[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(base, at, count, stride, width, values, BLOCK_WIDTH: tl.constexpr):
    """The other way; what lies outside is not touched."""
    across = tl.arange(0, BLOCK_WIDTH)
    inside = (at < count)[:, None] & (across < width)[None, :]
    tl.store(base + at[:, None] * stride + across[None, :], narrow(values, base.dtype.element_ty), mask=inside)
