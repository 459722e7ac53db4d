"""One token of each row of logits, without sorting the vocabulary: one program has one row, and reads it many times.

Where a cut lies is found by bisection over the bits of the logits, two bits in each pass: how much lies at or above
three values decides the next two bits. A row of 128,000 logits is half a megabyte, which the second-level cache holds.
The definition is sampling/reference.py; the order in which tokens are walked is explained there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from nybble.backends.torch.flash.numbers import OPTIONS

if TYPE_CHECKING:
    from nybble.backends.torch.ops.sampling.columns import Columns

MOST_SORTED = 2048
_BLOCK = 2048


@triton.jit
def _key(x):
    """int64 in [0, 2^32) that ascends with the logit; equal logits (0 and -0 too) have equal keys."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648


@triton.jit
def _load(row, at, vocab, floor):
    """Logits, with -inf for those below the floor and outside."""
    x = tl.load(row + at, mask=at < vocab, other=float("-inf"))
    return tl.where(x >= floor, x, float("-inf"))


@triton.jit
def _amount(x, largest, factor, COUNTS: tl.constexpr):
    """What a token weighs, in float64: its probability up to a factor, or one."""
    if COUNTS:
        return tl.where(x > float("-inf"), 1.0, 0.0).to(tl.float64)
    return tl.exp((x - largest) * factor).to(tl.float64)


@triton.jit
def _find(row, vocab, floor, largest, factor, wanted, over: tl.constexpr, lowest, COUNTS: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """The largest key k with amount(keys >= k) >= wanted (over: > wanted), at least `lowest`.

    Returns it, the amount above it, and how many tokens have it.
    """
    border = tl.zeros([], tl.int64)
    for step in range(16):
        shift = tl.full([], 30, tl.int64) - 2 * step
        unit = tl.full([], 1, tl.int64) << shift
        first = tl.zeros([BLOCK], tl.float64)
        second = tl.zeros([BLOCK], tl.float64)
        third = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, vocab, BLOCK):
            x = _load(row, begin + tl.arange(0, BLOCK), vocab, floor)
            key, amount = _key(x), _amount(x, largest, factor, COUNTS)
            first += tl.where(key >= border + unit, amount, 0.0)
            second += tl.where(key >= border + 2 * unit, amount, 0.0)
            third += tl.where(key >= border + 3 * unit, amount, 0.0)
        digit = _enough(tl.sum(first), wanted, border + unit, lowest, over)
        digit += _enough(tl.sum(second), wanted, border + 2 * unit, lowest, over)
        digit += _enough(tl.sum(third), wanted, border + 3 * unit, lowest, over)
        border += digit * unit
    border = tl.maximum(border, lowest)
    above = tl.zeros([BLOCK], tl.float64)
    equal = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, vocab, BLOCK):
        x = _load(row, begin + tl.arange(0, BLOCK), vocab, floor)
        key = _key(x)
        above += tl.where(key > border, _amount(x, largest, factor, COUNTS), 0.0)
        equal += (key == border).to(tl.int32)
    return border, tl.sum(above), tl.sum(equal)


@triton.jit
def _enough(amount, wanted, key, lowest, over: tl.constexpr):
    """1 where the border is at `key` or above it. All that is kept lies at `lowest` or above, and is enough."""
    enough = amount > wanted if over else amount >= wanted
    return (enough | (key <= lowest)).to(tl.int64)


@triton.jit
def _weight_of(key, largest, factor):
    """Of a token with this key, in float64."""
    ascending = (key - 2147483648).to(tl.int32)
    x = tl.where(ascending < 0, ascending ^ 0x7FFFFFFF, ascending).to(tl.float32, bitcast=True)
    return tl.exp((x - largest) * factor).to(tl.float64)


@triton.jit
def _extremes(row, vocab, BLOCK: tl.constexpr):
    """The largest logit, the first token that has it, and whether there is no NaN."""
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    broken = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, vocab, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < vocab, other=float("-inf"))
        where = tl.where(x > top, at, where)
        top = tl.where(x > top, x, top)
        broken += (x != x).to(tl.int32)
    largest = tl.max(top, axis=0)
    return largest, tl.min(tl.where(top == largest, where, vocab), axis=0), tl.sum(broken) == 0


@triton.jit
def _walk(row, vocab, floor, largest, factor, border, equals, target, BLOCK: tl.constexpr):
    """The first token, by id, at which the weights of the kept ones go over `target`; the last one if none does."""
    before = tl.zeros([], tl.float64)
    seen = tl.zeros([], tl.int32)
    found = tl.full([], 2147483647, tl.int32)
    last = tl.zeros([], tl.int32)
    for begin in range(0, vocab, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = _load(row, at, vocab, floor)
        key = _key(x)
        equal = (key == border).to(tl.int32)
        kept = (key > border) | ((equal > 0) & (seen + tl.cumsum(equal, 0) <= equals))
        weight = tl.where(kept, _amount(x, largest, factor, False), 0.0)
        reached = before + tl.cumsum(weight, 0)
        found = tl.minimum(found, tl.min(tl.where(kept & (reached > target), at, 2147483647), axis=0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0.0, at, 0), axis=0))
        before += tl.sum(weight)
        seen += tl.sum(equal)
    return tl.where(found == 2147483647, last, found)


@triton.jit
def _nth(row, vocab, key, n, BLOCK: tl.constexpr):
    """The n-th token, by id and from 0, with this key."""
    seen = tl.zeros([], tl.int32)
    found = tl.zeros([], tl.int32)
    for begin in range(0, vocab, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        equal = (_key(_load(row, at, vocab, float("-inf"))) == key).to(tl.int32)
        hit = (equal > 0) & (seen + tl.cumsum(equal, 0) == n + 1)
        found = tl.maximum(found, tl.max(tl.where(hit, at, 0), axis=0))
        seen += tl.sum(equal)
    return found


@triton.jit
def _cut_by_mass(row, vocab, floor, largest, factor, top_p, border, equals, total, BLOCK: tl.constexpr):
    """The fewest of the likeliest tokens whose weights reach top_p of the total: border, equals kept, their weight."""
    wanted = top_p.to(tl.float64) * total
    found, above, same = _find(row, vocab, floor, largest, factor, wanted, False, border, False, BLOCK)
    most = tl.where(found == border, equals, same)
    weight = _weight_of(found, largest, factor)
    needed = tl.ceil((wanted - above) / tl.where(weight > 0.0, weight, 1.0))
    kept = tl.minimum(tl.maximum(needed, 1.0), most.to(tl.float64)).to(tl.int32)
    return found, kept, above + kept.to(tl.float64) * weight


@triton.jit
def draw_kernel(
    logits, ids, good, greedies, temperatures, top_ks, top_ps, log_min_ps, uniforms, stride, vocab,
    MOST_BY_LOGIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ids[row] and good[row]; a row that is no distribution gets token 0."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * stride
    largest, first, sound = _extremes(row, vocab, BLOCK)
    sound = sound & (tl.abs(largest) < float("inf"))
    tl.store(good + index, sound)
    token = first
    if sound & (tl.load(greedies + index) == 0):
        temperature = tl.load(temperatures + index)
        factor = 1.0 / temperature
        top_k, top_p = tl.load(top_ks + index), tl.load(top_ps + index)
        lowest = largest.to(tl.float64) + temperature.to(tl.float64) * tl.load(log_min_ps + index)
        floor = tl.maximum(lowest, -3.4028234663852886e38).to(tl.float32)
        amounts = tl.zeros([BLOCK], tl.float64)
        counts = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, vocab, BLOCK):
            x = _load(row, begin + tl.arange(0, BLOCK), vocab, floor)
            amounts += _amount(x, largest, factor, False)
            counts += (x > float("-inf")).to(tl.int32)
        total, count = tl.sum(amounts), tl.sum(counts)
        cuts_k = (top_k > 0) & (top_k < vocab)
        border, equals = tl.zeros([], tl.int64), tl.zeros([], tl.int32)
        if cuts_k & (top_k < count):
            border, above, _ = _find(
                row, vocab, floor, largest, factor, top_k.to(tl.float64), False, border, True, BLOCK
            )
            equals = top_k - above.to(tl.int32)
            amounts = tl.zeros([BLOCK], tl.float64)
            for begin in range(0, vocab, BLOCK):
                x = _load(row, begin + tl.arange(0, BLOCK), vocab, floor)
                amounts += tl.where(_key(x) > border, _amount(x, largest, factor, False), 0.0)
            total = tl.sum(amounts) + equals.to(tl.float64) * _weight_of(border, largest, factor)
            count = top_k
        if top_p < 1.0:
            border, equals, total = _cut_by_mass(
                row, vocab, floor, largest, factor, top_p, border, equals, total, BLOCK
            )
            counts = tl.zeros([BLOCK], tl.int32)
            for begin in range(0, vocab, BLOCK):
                counts += (_key(_load(row, begin + tl.arange(0, BLOCK), vocab, floor)) > border).to(tl.int32)
            count = tl.sum(counts) + equals
        target = tl.load(uniforms + index) * total
        by_logit = (cuts_k & (top_k <= MOST_BY_LOGIT)) | ((top_p < 1.0) & (count <= MOST_BY_LOGIT) & (cuts_k == 0))
        if by_logit:
            if border == 0:  # the floor alone cuts: all that are left count
                equals = 0
            found, above, same = _find(row, vocab, floor, largest, factor, target, True, border, False, BLOCK)
            most = tl.where((found == border) & (border > 0), equals, same)
            weight = _weight_of(found, largest, factor)
            n = tl.floor((target - above) / tl.where(weight > 0.0, weight, 1.0))
            n = tl.minimum(tl.maximum(n, 0.0), tl.maximum(most - 1, 0).to(tl.float64)).to(tl.int32)
            token = _nth(row, vocab, found, n, BLOCK)
        else:
            token = _walk(row, vocab, floor, largest, factor, border, equals, target, BLOCK)
    tl.store(ids + index, token.to(tl.int64))


def draw(logits: torch.Tensor, columns: Columns) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [rows, vocab] -> ids int64 [rows], and whether the row was a distribution."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    good = torch.empty(len(logits), dtype=torch.bool, device=logits.device)
    draw_kernel[(len(logits),)](
        logits, ids, good, columns.greedy, columns.temperature, columns.top_k, columns.top_p,
        torch.log(columns.min_p.double()), columns.u, logits.stride(0), logits.shape[1], MOST_BY_LOGIT=MOST_SORTED,
        BLOCK=_BLOCK, **OPTIONS, num_warps=8,
    )  # fmt: skip
    return ids, good
