"""One layer, changed group by group: each group of linears reads what those before it give once they have changed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nybble.backends.torch import Layer
from nybble.compress.calibration.stream import Moments, Stream

# Told the index of a group of linears (of LINEAR_GROUPS) and what it reads; it may change the layer's weights. If it
# narrows the layer, it gives the inputs of this group that stay, ascending; None: all.
OnGroup = Callable[[int, Moments], torch.Tensor | None]


def walk_groups(stream: Stream, index: int, layer: Layer, on_group: OnGroup, *, full: bool) -> None:
    """Run layer `index` over the stream, and leave the output of what it has become. full: as in Moments."""
    hidden = stream.decoder.spec.hidden_size
    moments = Moments.zeros(hidden, full=full)
    for part in stream.batches():
        moments.add(layer.attention_input(stream.read(index, part)))
    on_group(0, moments)

    width = layer.weights["attn.o"].shape[1]
    mixed = stream.buffer(width)
    moments = Moments.zeros(width, full=full)
    for part in stream.batches():
        values = layer.attention_mix(layer.attention_input(stream.read(index, part)))
        mixed.write(part, values)
        moments.add(values)
    kept = on_group(1, moments)

    out = stream.output(index)
    moments = Moments.zeros(hidden, full=full)
    for part in stream.batches():
        values = mixed.read(part)
        values = layer.add_attention(stream.read(index, part), values if kept is None else values[..., kept])
        out.write(part, values)
        moments.add(layer.ffn_input(values))
    on_group(2, moments)

    moments = Moments.zeros(layer.weights["ffn.down"].shape[1], full=full)
    for part in stream.batches():
        moments.add(layer.ffn_mix(layer.ffn_input(out.read(part))))
    on_group(3, moments)
    for part in stream.batches():
        x = out.read(part)
        out.write(part, layer.add_ffn(x, layer.ffn_mix(layer.ffn_input(x))))
    out.close()
