"""Which part of a model each process has. A part is a model too: a ModelSpec with fewer heads and a narrower middle.

As in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053): q, k, v, gate and up are cut by rows, o and down by columns,
so that each half of a layer needs one sum over all ranks. The embedding and the head are cut by vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from nybble.backends.torch.parallel.cut import columns_of, rows_of
from nybble.checkpoint import Checkpoint, Tensor
from nybble.core.errors import ConfigError
from nybble.core.spec import LayerSpec, ModelSpec

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part. spec: of that part, with the whole vocabulary; vocab: the range of each rank.

    tensors: the part's own, cut when they are read.
    """

    spec: ModelSpec
    tensors: Mapping[str, Tensor]
    vocab: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class LayerRanges:
    """What a rank has of a layer: query heads, key heads, and the feed-forward part's width."""

    q: Range
    kv: Range
    ffn: Range


def split(total: int, size: int, unit: int = 1) -> list[Range]:
    """`size` ranges that cover 0 to total, cut at multiples of `unit`, as equal as that allows.

    Raises:
        ConfigError: some range would be empty.
    """
    units = -(-total // unit)
    if units < size:
        raise ConfigError(f"{total} cannot be split over {size} ranks in multiples of {unit}")
    cuts = [min(units * rank // size * unit, total) for rank in range(size + 1)]
    return list(pairwise(cuts))


def make_shard(checkpoint: Checkpoint, rank: int, size: int) -> Shard:
    """The part of one rank; everything for a size of 1.

    Raises:
        ConfigError: the model cannot be split over so many ranks.
    """
    spec = checkpoint.spec
    vocab = tuple(split(spec.vocab_size, size, 64 if spec.vocab_size >= 64 * size else 1))
    if size == 1:
        return Shard(spec, checkpoint.tensors, vocab)
    ranges = [
        layer_ranges(layer, rank, size, _unit(checkpoint.tensors[f"layers.{i}.ffn.down"], layer.ffn_size, size))
        for i, layer in enumerate(spec.layers)
    ]
    local = [_local(layer, own, rank) for layer, own in zip(spec.layers, ranges, strict=True)]
    tensors = _LocalTensors(checkpoint, ranges, vocab[rank], rank)
    return Shard(replace(spec, layers=tuple(local)), tensors, vocab)


def layer_ranges(layer: LayerSpec, rank: int, size: int, ffn_unit: int) -> LayerRanges:
    """A rank's share of a layer. Where there are fewer key heads than ranks, several ranks have the same one.

    Raises:
        ConfigError: the heads cannot be split so.
    """
    q_heads, kv_heads = layer.num_q_heads, layer.num_kv_heads
    group = q_heads // kv_heads
    ffn = split(layer.ffn_size, size, ffn_unit)[rank]
    if kv_heads >= size:
        kv = split(kv_heads, size)[rank]
        return LayerRanges((kv[0] * group, kv[1] * group), kv, ffn)
    sharers, rest = divmod(size, kv_heads)
    if rest or group < sharers:
        raise ConfigError(
            f"{q_heads} query heads on {kv_heads} key heads cannot be split over {size} ranks: set "
            f"tensor_parallel_size to a divisor or a multiple of {kv_heads}, at most {q_heads}"
        )
    head = rank // sharers
    begin, end = split(group, sharers)[rank % sharers]
    return LayerRanges((head * group + begin, head * group + end), (head, head + 1), ffn)


def _local(layer: LayerSpec, own: LayerRanges, rank: int) -> LayerSpec:
    return replace(
        layer,
        num_q_heads=own.q[1] - own.q[0],
        num_kv_heads=own.kv[1] - own.kv[0],
        ffn_size=own.ffn[1] - own.ffn[0],
        out_bias=layer.out_bias and rank == 0,  # the outputs of all ranks are added up: once is enough
    )


def _unit(down: Tensor, ffn_size: int, size: int) -> int:
    """What `down` is cut in multiples of, so that no block or group is cut through, if that leaves each rank some."""
    unit = max(down.format.block_size, 128) if down.packed is None else 128
    while ffn_size < unit * size and unit > 1:
        unit //= 2
    return unit


class _LocalTensors(Mapping[str, Tensor]):
    def __init__(self, checkpoint: Checkpoint, ranges: list[LayerRanges], vocab: Range, rank: int) -> None:
        self._whole = checkpoint.tensors
        self._spec = checkpoint.spec
        self._ranges = ranges
        self._vocab = vocab
        self._rank = rank

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._whole if self._rank == 0 or not name.endswith("attn.o.bias"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._whole[name]
        if name in ("embed", "head"):
            return rows_of(tensor, *self._vocab)
        if not name.startswith("layers."):
            return tensor
        _, index, inner = name.split(".", 2)
        own, head_dim = self._ranges[int(index)], self._spec.layers[int(index)].head_dim
        q, kv = ((begin * head_dim, end * head_dim) for begin, end in (own.q, own.kv))
        rows = {"attn.q": q, "attn.k": kv, "attn.v": kv, "ffn.gate": own.ffn, "ffn.up": own.ffn}
        columns = {"attn.o": q, "ffn.down": own.ffn}
        if inner.removesuffix(".bias") in rows:
            return rows_of(tensor, *rows[inner.removesuffix(".bias")])
        return columns_of(tensor, *columns[inner]) if inner in columns else tensor
