"""Which tensors of a decoder an adapter changes: from the names of both containers to canonical ones."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nybble.core.errors import CheckpointError
from nybble.core.spec import LayerSpec, ModelSpec
from nybble.families.common import layer_shapes

_HF = {
    "self_attn.q_proj": ("attn.q",), "self_attn.k_proj": ("attn.k",), "self_attn.v_proj": ("attn.v",),
    "self_attn.o_proj": ("attn.o",), "self_attn.qkv_proj": ("attn.q", "attn.k", "attn.v"),
    "mlp.gate_proj": ("ffn.gate",), "mlp.up_proj": ("ffn.up",), "mlp.down_proj": ("ffn.down",),
    "mlp.gate_up_proj": ("ffn.gate", "ffn.up"),
}  # fmt: skip
_GGUF = {
    "attn_q": ("attn.q",), "attn_k": ("attn.k",), "attn_v": ("attn.v",), "attn_output": ("attn.o",),
    "attn_qkv": ("attn.q", "attn.k", "attn.v"), "ffn_gate": ("ffn.gate",), "ffn_up": ("ffn.up",),
    "ffn_down": ("ffn.down",),
}  # fmt: skip
_HF_NAME = re.compile(r"(?:model\.|language_model\.)*layers\.(\d{1,5})\.(.+)")
_GGUF_NAME = re.compile(r"blk\.(\d{1,5})\.(.+)\.weight")
# Files of these architectures have the rows of q and k in another order than Hugging Face's.
_INTERLEAVED = ("llama",)


@dataclass(frozen=True, slots=True)
class Target:
    """What a pair of factors changes: one canonical tensor by some rows of the second factor.

    reorder: from halves to pairs of each head ("interleave"), back ("split"), or as it is (None).
    """

    layer: int
    name: str  # inside of the layer: attn.q, ffn.down, ...
    rows: tuple[int, int]
    in_features: int
    reorder: str | None = None
    heads: int = 1


def targets(spec: ModelSpec, name: str, *, container: str, where: str) -> list[Target]:
    """What the factors of a module (PEFT) or tensor (GGUF) change.

    Raises:
        CheckpointError: the model has no such module, or it is not one that adapters can change here.
    """
    is_gguf = container == "gguf"
    match = (_GGUF_NAME if is_gguf else _HF_NAME).fullmatch(name)
    parts = (_GGUF if is_gguf else _HF).get(match[2]) if match else None
    if match is None or parts is None:
        raise CheckpointError(
            f"{where} changes {name!r:.120}, which is not supported: only the linear layers of attention and "
            "feed-forward parts are (not the embedding or the head)"
        )
    index = int(match[1])
    if index >= len(spec.layers):
        raise CheckpointError(
            f"{where} changes layer {index} of a model, this one has {len(spec.layers)}: it was made for another model"
        )
    if is_gguf and parts == ("ffn.up",) and spec.family == "phi3":
        parts = ("ffn.gate", "ffn.up")  # one tensor with the name of the second
    layer = spec.layers[index]
    shapes = layer_shapes(layer, spec.hidden_size)
    found, begin = [], 0
    for part in parts:
        rows, cols = shapes[part]
        reorder, heads = _order(layer, part, in_file=is_gguf and spec.family in _INTERLEAVED)
        found.append(Target(index, part, (begin, begin + rows), cols, reorder, heads))
        begin += rows
    return found


def _order(layer: LayerSpec, part: str, *, in_file: bool) -> tuple[str | None, int]:
    """How the rows of q and k must be moved from the adapter's order to the model's."""
    heads = {"attn.q": layer.num_q_heads, "attn.k": layer.num_kv_heads}.get(part)
    if heads is None or in_file == layer.rope.interleaved:
        return None, 1
    return ("interleave" if layer.rope.interleaved else "split"), heads
