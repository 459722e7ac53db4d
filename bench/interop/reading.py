"""The same tokens through nybble and through transformers, as logits to compare. Needs torch and transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from nybble.backends.cpu import CpuModel
from nybble.backends.torch import TorchDecoder
from nybble.checkpoint import open_checkpoint
from nybble.engine.scheduler import blocks_for
from nybble.evaluate.divergence import Divergence, divergence
from nybble.evaluate.windows import window_logits
from nybble.tokenizer import load_tokenizer

Logits = npt.NDArray[np.float32]


def tokens_of(folder: Path, text: Path, count: int) -> list[int]:
    return load_tokenizer(open_checkpoint(folder).tokenizer).encode(
        text.read_text("utf-8")[: count * 8], add_special=False
    )[:count]


def decoder_logits(folder: Path, ids: list[int]) -> Logits:
    """nybble's float32 decoder over the weights of the folder: what its files mean."""
    with torch.no_grad():
        return TorchDecoder(open_checkpoint(folder)).logits(torch.tensor([ids]))[0].numpy()


def kernel_logits(folder: Path, ids: list[int]) -> Logits:
    """nybble's packed kernels, which round activations: what it serves."""
    model = CpuModel.load(open_checkpoint(folder), context=len(ids))
    model.new_cache(blocks_for(len(ids)))
    return np.concatenate([rows for _, rows in window_logits(model, ids)])


def transformers_logits(folder: Path, ids: list[int], dtype: str = "float32") -> Logits:
    """What transformers says, with whatever package the folder's quantization_config asks for."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), device_map="cpu")
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def dequantized_logits(folder: Path, ids: list[int]) -> Logits:
    """The same with weights that the package itself has expanded to float32: leaves out how its kernels round."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    model.dequantize()
    with torch.inference_mode():
        return model.float()(torch.tensor([ids])).logits[0].float().numpy()


def row(name: str, *pairs: tuple[str, Logits, Logits]) -> str:
    """One line: for each pair its mean divergence, its largest difference of a logit, and how often the top agrees."""
    parts = []
    for what, one, other in pairs:
        found: Divergence = divergence(one, other)
        worst = float(np.abs(one - other).max())
        parts.append(f"{what}: KL {found.mean_kl:.2e}, worst logit {worst:.3g}, same top {found.top1_agreement:.1%}")
    return f"{name} | " + " | ".join(parts)
