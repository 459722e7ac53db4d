"""Decode steps padded to a few sizes: the same logits, one capture per size, and nothing written for the padding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends.torch.serving import BLOCKS, CONTEXT, Folders, in_torch, step  # noqa: E402
from nybble.backends.torch.serve.graphs import GraphRunner, sizes_up_to  # noqa: E402
from nybble.backends.torch.serve.inputs import BLOCK_SIZE, from_flat, host_inputs, layout, to_flat  # noqa: E402

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore:.*model shards")]


class Recorded:
    """Stands in for CUDA: what was captured runs again on the same buffers."""

    def __init__(self) -> None:
        self.captures = 0
        self.replays = 0

    def __call__(self, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.captures += 1
        function()

        def replay() -> torch.Tensor:
            self.replays += 1
            return function()

        return replay


FIRST = {5: 0, 3: 12}  # the block of the first of the sequences that have so many tokens


def prefill(at: int) -> object:
    """Nine sequences of `at` tokens, each in a block of its own."""
    return step([([i + 1] * at, 0, [FIRST[at] + i]) for i in range(9)])


def decode(count: int, *, at: int = 5) -> object:
    """One token of each of the first sequences."""
    return step([([40 + i], at, [FIRST[at] + i]) for i in range(count)])


def test_sizes() -> None:
    assert sizes_up_to(20) == [1, 2, 4, 8, 16]
    assert sizes_up_to(512)[-2:] == [480, 512]


def test_replayed_steps_are_the_eager_ones(folders: Folders) -> None:
    model = in_torch(folders("llama"))
    rank, decoder = model._rank, model._rank.decoder
    for at in FIRST:
        model.execute(prefill(at))
    wanted = {(count, at): model.execute(decode(count, at=at)) for count in (1, 3, 4, 7, 8) for at in (5, 3)}
    kept = rank.cache.layers[1].k.clone()
    capture = Recorded()
    rank._graphs = GraphRunner(
        run=lambda s: decoder.logits(decoder.forward(decoder.embed(s.token_ids), s, rank.needed_cache())),
        capture=capture,
        device=torch.device("cpu"),
        table_width=CONTEXT // BLOCK_SIZE,
        largest=8,
    )
    for (count, at), logits in wanted.items():
        np.testing.assert_allclose(model.execute(decode(count, at=at)), logits, rtol=0, atol=1e-5)
    assert (capture.captures, capture.replays) == (3, len(wanted))  # for 1, 4 and 8
    assert torch.allclose(rank.cache.layers[1].k, kept, atol=1e-6)
    first = model.execute(decode(2))
    second = model.execute(decode(2, at=3))
    assert np.abs(first - second).max() > 0  # an answer stays as it was when the buffers are used again
    np.testing.assert_allclose(first, model.execute(decode(2)), rtol=0, atol=0)
    replays = capture.replays
    model.execute(decode(9))  # too large
    model.execute(step([([1, 2], 5, [0])]))  # more than one token
    model.execute(step([([1], 5, [0]), ([2], 5, [1])], rows=[1]))  # not all logits
    model.execute(step([([1], 5, [0])], hidden=[0]))
    assert capture.replays == replays
    model.new_cache(BLOCKS)  # the graphs read the old one
    model.execute(prefill(5))
    np.testing.assert_allclose(model.execute(decode(3)), wanted[3, 5], rtol=0, atol=1e-5)
    assert capture.captures == 5  # 2 sequences took one of their own


def test_a_step_travels_in_one_piece() -> None:
    one = step([([1, 2, 3], 0, [4]), ([5], 17, [6, 7])], rows=[2, 3], hidden=[0])
    host = host_inputs(one, vocab_size=10, num_blocks=8, context=64)
    assert host.slots.tolist() == [64, 65, 66, 7 * 16 + 1]
    assert (host.max_q_len, host.num_decodes, host.is_decode) == (3, 0, False)
    flat = to_flat(host)
    again = from_flat(host.header, flat)
    for name, begin, _ in layout(host.header)[:-1]:
        np.testing.assert_array_equal(getattr(again, name), getattr(host, name))
        assert begin % 4 == 0
    with pytest.raises(ValueError, match="numbers, not"):
        from_flat(host.header, flat[:-1])
