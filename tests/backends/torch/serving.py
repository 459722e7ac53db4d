"""What the tests of the torch backend's serving share: small models, and both backends over them."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from native.tiny_models import TinyModel
from nybble.backends.cpu import CpuModel, Step
from nybble.backends.device import DeviceOptions
from nybble.backends.torch.serve import TorchModel
from nybble.checkpoint import Checkpoint, Tensor, open_checkpoint
from nybble.core.tokenizer_source import GgufTokenizer
from nybble.quant.formats import FORMATS


class Folders(Protocol):
    """Small random models, made when they are first asked for."""

    def __call__(self, family: str, **overrides: object) -> Path: ...


Floats = npt.NDArray[np.float32]
BLOCKS, CONTEXT = 24, 128


def as_checkpoint(model: TinyModel) -> Checkpoint:
    tensors = {
        name: Tensor(name, shape, FORMATS[fmt], memoryview(data)) for name, (fmt, shape, data) in model.raw.items()
    }
    return Checkpoint(
        path=Path("tiny.gguf"),
        container="gguf",
        spec=model.spec,
        tensors=tensors,
        tokenizer=GgufTokenizer({}),
        chat_template=None,
        eos_token_ids=(),
        bos_token_id=None,
        add_bos=False,
        metadata={},
        file_bytes=0,
    )


def native(source: Checkpoint | Path, kv_cache_type: str = "f16") -> CpuModel:
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    model = CpuModel.load(checkpoint, threads=2, context=CONTEXT, kv_cache_type=kv_cache_type)  # type: ignore[arg-type]
    model.new_cache(BLOCKS)
    return model


def in_torch(source: Checkpoint | Path, kv_cache_type: str = "f16", **options: object) -> TorchModel:
    checkpoint = open_checkpoint(source) if isinstance(source, Path) else source
    model = TorchModel.load(
        checkpoint,
        device="torch-cpu",
        options=DeviceOptions(device="torch-cpu", **options),  # type: ignore[arg-type]
        threads=2,
        context=CONTEXT,
        kv_cache_type=kv_cache_type,
    )
    model.new_cache(BLOCKS)
    return model


def step(
    pieces: list[tuple[list[int], int, list[int]]], *, rows: list[int] | None = None, hidden: list[int] | None = None
) -> Step:
    """Of each sequence its new tokens, how many it has in the cache, and its blocks. rows: None asks for all logits."""
    counts = [len(tokens) for tokens, _, _ in pieces]
    tables = np.full((len(pieces), max(len(blocks) for _, _, blocks in pieces)), 9999, np.int32)
    for row, (_, _, blocks) in enumerate(pieces):
        tables[row, : len(blocks)] = blocks
    return Step(
        token_ids=np.array([token for tokens, _, _ in pieces for token in tokens], np.int32),
        cu_seqlens_q=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        context_lens=np.array([context for _, context, _ in pieces], np.int32),
        block_tables=tables,
        logit_rows=np.array(range(sum(counts)) if rows is None else rows, np.int32),
        hidden_rows=None if hidden is None else np.array(hidden, np.int32),
    )


def run_some(model: CpuModel | TorchModel, vocab: int) -> list[Floats]:
    """Logits of prompts in pieces, of decoding beside a prompt, and of decoding alone, with blocks in any order."""
    tokens = [(7 * i * i + 3 * i + 1) % vocab for i in range(90)]
    one, two, three = [7, 2, 11], [5, 0, 9, 1], [20, 21, 22, 23, 4, 6]
    return [
        np.asarray(model.execute(one_step))
        for one_step in (
            step([(tokens[:33], 0, one)]),
            step([(tokens[33:34], 33, one), (tokens[:20], 0, two)]),
            step([(tokens[34:35], 34, one), (tokens[20:50], 20, two), (tokens[:70], 0, three)]),
            step([(tokens[35:36], 35, one), (tokens[50:51], 50, two), (tokens[70:71], 70, three)]),
            step([(tokens[50:53], 50, two), (tokens[70:75], 70, three)]),  # as speculation checks guesses
        )
    ]
