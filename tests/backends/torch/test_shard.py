"""Which part of a model each rank has: the parts of a matrix multiply to what the whole one does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from backends.torch.serving import as_checkpoint  # noqa: E402
from native.tiny_models import random_matrix, tiny  # noqa: E402
from nybble.backends.torch.parallel.cut import columns_of, rows_of  # noqa: E402
from nybble.backends.torch.parallel.shard import layer_ranges, make_shard, split  # noqa: E402
from nybble.checkpoint import Tensor  # noqa: E402
from nybble.core.errors import ConfigError  # noqa: E402
from nybble.core.spec import LayerSpec, RopeSpec  # noqa: E402
from nybble.families.common import expected_shapes  # noqa: E402
from nybble.quant.formats import FORMATS  # noqa: E402
from nybble.quant.weights import Codebook4, Float8, GroupedInt, PackedWeight, RowInt8  # noqa: E402

pytestmark = pytest.mark.unit

RNG = np.random.default_rng(0)


def layer(q_heads: int, kv_heads: int, ffn: int = 96) -> LayerSpec:
    return LayerSpec(q_heads, kv_heads, 16, ffn, RopeSpec(10000.0, 16), 0.25, out_bias=True)


def test_ranges_cover_everything() -> None:
    assert split(10, 3) == [(0, 3), (3, 6), (6, 10)]
    assert split(300, 2, 128) == [(0, 128), (128, 300)]
    assert split(64, 1, 128) == [(0, 64)]
    with pytest.raises(ConfigError, match="64 cannot be split over 2 ranks in multiples of 64"):
        split(64, 2, 64)


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "size", "q", "kv"),
    [
        (8, 4, 2, [(0, 4), (4, 8)], [(0, 2), (2, 4)]),
        (6, 3, 2, [(0, 2), (2, 6)], [(0, 1), (1, 3)]),  # uneven
        (4, 1, 2, [(0, 2), (2, 4)], [(0, 1), (0, 1)]),  # replicated
        (8, 2, 4, [(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (14, 2, 2, [(0, 7), (7, 14)], [(0, 1), (1, 2)]),
    ],
)
def test_heads(q_heads: int, kv_heads: int, size: int, q: list, kv: list) -> None:
    found = [layer_ranges(layer(q_heads, kv_heads), rank, size, 8) for rank in range(size)]
    assert [one.q for one in found] == q
    assert [one.kv for one in found] == kv
    for one in found:  # each of a rank's query heads belongs to the key head that its own counting gives
        group = q_heads // kv_heads
        local = (one.q[1] - one.q[0]) // (one.kv[1] - one.kv[0])
        assert [(one.q[0] + i) // group for i in range(one.q[1] - one.q[0])] == [
            one.kv[0] + i // local for i in range(one.q[1] - one.q[0])
        ]


@pytest.mark.parametrize(("heads", "size"), [((4, 2), 3), ((2, 2), 4), ((6, 4), 8)])
def test_heads_that_cannot_be_split(heads: tuple[int, int], size: int) -> None:
    with pytest.raises(ConfigError, match=rf"cannot be split over {size} ranks: set tensor_parallel_size"):
        layer_ranges(layer(*heads), 0, size, 1)


GGUF = [name for name, fmt in FORMATS.items() if fmt.has_kernel and fmt.ggml_type is not None]


@pytest.mark.parametrize("name", GGUF)
@pytest.mark.parametrize("cut", [256, 96])  # the second one cuts through blocks of 256
def test_parts_of_a_gguf_matrix(name: str, cut: int) -> None:
    tensor = Tensor("w", (24, 512), FORMATS[name], memoryview(random_matrix(name, (24, 512), RNG)))
    whole = tensor.to_float32()
    np.testing.assert_array_equal(rows_of(tensor, 5, 19).to_float32(), whole[5:19])
    parts = [columns_of(tensor, 0, cut), columns_of(tensor, cut, 512)]
    np.testing.assert_array_equal(np.hstack([part.to_float32() for part in parts]), whole)
    is_aligned = cut % FORMATS[name].block_size == 0
    assert all((part.format.name == name) == is_aligned for part in parts if name != "F32")


def packed() -> list[tuple[str, PackedWeight]]:
    codes4, codes8 = (RNG.integers(0, top, (32, 256), dtype=np.uint8) for top in (16, 120))
    scales = RNG.random((32, 4)).astype(np.float16)
    scattered = RNG.permutation(np.arange(256, dtype=np.int32) // 64)
    return [
        ("groups", GroupedInt(4, 64, codes4, scales, RNG.integers(0, 16, (32, 4)))),
        ("act-order", GroupedInt(4, 64, codes4, scales, None, scattered)),
        ("a group a row", GroupedInt(8, 256, codes8, scales[:, :1])),
        ("nf4", Codebook4("nf4", codes4, RNG.random(128).astype(np.float32))),
        ("int8", RowInt8(codes8.view(np.int8), RNG.random(32).astype(np.float32))),
        ("fp8 rows", Float8(codes8, RNG.random((32, 1)).astype(np.float32))),
        ("fp8 blocks", Float8(codes8, RNG.random((2, 4)).astype(np.float32), (16, 64))),
    ]


@pytest.mark.parametrize(("name", "weight"), packed(), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("cut", [128, 96])
def test_parts_of_a_packed_matrix(name: str, weight: PackedWeight, cut: int) -> None:
    tensor = Tensor("w", (32, 256), FORMATS["U8"], memoryview(b""), packed=lambda: weight)
    whole = weight.decode()
    np.testing.assert_array_equal(rows_of(tensor, 16, 32).to_float32(), whole[16:])
    np.testing.assert_array_equal(rows_of(tensor, 3, 32).to_float32(), whole[3:])
    parts = [columns_of(tensor, 0, cut), columns_of(tensor, cut, 256)]
    np.testing.assert_array_equal(np.hstack([part.to_float32() for part in parts]), whole)


@pytest.mark.parametrize("name", ["llama-q4_k", "qwen-mix", "gemma-q8_0"])
def test_a_part_is_a_model(name: str) -> None:
    """Its tensors have the shapes of its own spec, and one rank alone adds the bias of o."""
    source = as_checkpoint(tiny(name))
    for rank in range(2):
        shard = make_shard(source, rank, 2)
        begin, end = shard.vocab[rank]
        shapes = expected_shapes(replace(shard.spec, vocab_size=end - begin))
        assert {name: tensor.shape for name, tensor in shard.tensors.items()} == shapes
        assert all((rank == 0 and old.out_bias) == new.out_bias for old, new in
                   zip(source.spec.layers, shard.spec.layers, strict=True))  # fmt: skip
