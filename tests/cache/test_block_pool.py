"""BlockPool never hands out a block twice, whatever is asked of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nybble.cache import BlockPool

pytestmark = pytest.mark.unit


def test_hands_out_and_takes_back():
    pool = BlockPool(4)
    first = pool.allocate(3)
    assert pool.num_free == 1
    pool.free(first[:2])
    assert sorted(pool.allocate(3)) == sorted({0, 1, 2, 3} - {first[2]})
    pool.check_integrity()


def test_takes_nothing_when_there_is_too_little():
    pool = BlockPool(4)
    with pytest.raises(MemoryError, match="5 cache blocks were asked for, 4 of 4 are free"):
        pool.allocate(5)
    assert pool.num_free == 4


@pytest.mark.parametrize("ids", [[0], [4], [-1], [1, 1], [1, 0]])
def test_refuses_blocks_that_are_not_in_use(ids):
    pool = BlockPool(4)
    pool.free([pool.allocate(2)[0]])  # block 1 is in use
    with pytest.raises(ValueError, match="block"):
        pool.free(ids)
    pool.check_integrity()
    assert pool.num_free == 3


@pytest.mark.parametrize("size", [0, -1])
def test_refuses_an_empty_pool(size):
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(size)


@given(st.lists(st.integers(-8, 8), max_size=60))
def test_stays_whole(steps):
    """Positive: allocate so many; negative: give the oldest back."""
    pool, held = BlockPool(16), []
    for step in steps:
        if step > 0 and step <= pool.num_free:
            held += pool.allocate(step)
        elif step < 0:
            pool.free(held[:-step])
            held = held[-step:]
        assert len(set(held)) == len(held) == 16 - pool.num_free
        pool.check_integrity()
