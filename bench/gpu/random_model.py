"""A Llama with random weights in memory, at the shapes of a real one: speed does not depend on what weights say."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nybble.checkpoint import Checkpoint, Tensor
from nybble.core.spec import LayerSpec, ModelSpec, RopeSpec
from nybble.core.tokenizer_source import GgufTokenizer
from nybble.families.common import expected_shapes
from nybble.quant.formats import FORMATS

# hidden, layers, query heads, key heads, feed-forward width, vocabulary
SHAPES = {
    "llama-2-7b": (4096, 32, 32, 32, 11008, 32000),
    "llama-3-8b": (4096, 32, 32, 8, 14336, 128256),
    "tiny": (256, 2, 4, 2, 512, 512),
}
CONTEXT = 4096
ENCODINGS = ("BF16", "Q4_K", "Q8_0")


def random_checkpoint(shape: str, encoding: str, seed: int = 0) -> Checkpoint:
    """Matrices in `encoding`, the head in BF16; tensors of one shape share their bytes on the host."""
    hidden, layers, q_heads, kv_heads, ffn, vocab = SHAPES[shape]
    head_dim = hidden // q_heads
    layer = LayerSpec(q_heads, kv_heads, head_dim, ffn, RopeSpec(10000.0, head_dim), head_dim**-0.5)
    spec = ModelSpec("llama", vocab, hidden, CONTEXT, 1e-5, (layer,) * layers, tied_head=False)
    rng = np.random.default_rng(seed)

    @cache
    def content(name: str, size: tuple[int, ...]) -> memoryview:
        return memoryview(random_bytes(name, size, rng)).cast("B")

    tensors = {}
    for name, size in expected_shapes(spec).items():
        kind = "F32" if len(size) == 1 else "BF16" if name in ("embed", "head") else encoding
        tensors[name] = Tensor(name, size, FORMATS[kind], content(kind, size))
    return Checkpoint(
        path=Path(f"random {shape}"),
        container="gguf",
        spec=spec,
        tensors=tensors,
        tokenizer=GgufTokenizer({}),
        chat_template=None,
        eos_token_ids=(),
        bos_token_id=None,
        add_bos=False,
        metadata={},
        file_bytes=sum(len(tensor.data) for tensor in tensors.values()),
    )


def random_bytes(kind: str, size: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Values of about 1 / sqrt(columns); ones for norms."""
    if len(size) == 1:
        return np.ones(size, np.float32).view(np.uint8)
    rows, cols = size
    if kind == "BF16":
        one = rng.standard_normal((min(rows, 1024), cols), np.float32) / np.float32(np.sqrt(cols))
        values = np.resize(one, (rows, cols))
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    fmt = FORMATS[kind]
    blocks = rng.integers(0, 256, (rows * cols // fmt.block_size, fmt.block_bytes), dtype=np.uint8)
    scale = np.float16({"Q4_K": 0.001, "Q8_0": 0.01}[kind] / np.sqrt(cols))
    blocks[:, :2] = scale.reshape(1).view(np.uint8)
    if kind == "Q4_K":  # and the scale of the minima
        blocks[:, 2:4] = np.float16(7.5 * float(scale)).reshape(1).view(np.uint8)
    return blocks
