"""Logits of the native executor and of transformers over the same token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nybble.backends.cpu import CpuModel, Step
from nybble.checkpoint import open_checkpoint

Windows = npt.NDArray[np.int32]  # [windows, tokens]
Logits = npt.NDArray[np.float32]


def native_logits(path: Path, windows: Windows, activations: str, monkeypatch: pytest.MonkeyPatch) -> Logits:
    """[windows * tokens, vocab]; `activations` is what NYBBLE_ACT says."""
    monkeypatch.setenv("NYBBLE_ACT", activations)
    tokens = windows.shape[1]
    blocks = -(-tokens // 16)
    model = CpuModel.load(open_checkpoint(path), threads=2, context=tokens)
    model.new_cache(blocks)
    rows = np.arange(tokens, dtype=np.int32)
    return np.concatenate(
        [
            model.execute(
                Step(
                    token_ids=window,
                    cu_seqlens_q=np.array([0, tokens], np.int32),
                    context_lens=np.zeros(1, np.int32),
                    block_tables=np.arange(blocks, dtype=np.int32)[None],
                    logit_rows=rows,
                )
            )
            for window in windows
        ]
    )


def transformers_logits(model: Any, windows: Windows) -> Logits:
    """The same from a model of transformers."""
    import torch

    with torch.no_grad():
        found = [model(torch.from_numpy(window[None].astype(np.int64))).logits[0].float().numpy() for window in windows]
    return np.concatenate(found)


def weights_of(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The weights of a file as floats, under nybble's names."""
    checkpoint = open_checkpoint(path)
    try:
        return {name: tensor.to_float32() for name, tensor in checkpoint.tensors.items()}
    finally:
        checkpoint.close()
