"""Fills an importance matrix: reads calibration text with the torch decoder, one layer in memory at a time.

Needs torch; import it only where that is there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nybble.backends.torch import TorchDecoder
from nybble.checkpoint import Checkpoint
from nybble.compress.gguf.imatrix import ImportanceMatrix
from nybble.compress.methods import Progress
from nybble.core.errors import ConfigError
from nybble.families.common import GGUF_NAMES
from nybble.tokenizer import load_tokenizer

_TOKENS_AT_ONCE = 2048  # bounds what attention and feed-forward hold between their linears
_FUSED = {"attn.q": "blk.{i}.attn_qkv.weight", "ffn.gate": "blk.{i}.ffn_up.weight"}  # Phi 3


def check_window(checkpoint: Checkpoint, ctx: int) -> None:
    """Raises ConfigError if the model cannot read windows of so many tokens."""
    if not 8 <= ctx <= checkpoint.spec.context_length:
        raise ConfigError(f"--ctx must be 8 to {checkpoint.spec.context_length} for this model, not {ctx}")


def calibration_windows(checkpoint: Checkpoint, text: str, *, ctx: int, chunks: int | None) -> list[list[int]]:
    """The text as windows of `ctx` tokens, each begun as the model expects a text to begin; a shorter rest is left out.

    Raises ConfigError if there is less than one window, or fewer than `chunks`.
    """
    check_window(checkpoint, ctx)
    token_ids = load_tokenizer(checkpoint.tokenizer).encode(text, add_special=False)
    found = len(token_ids) // ctx
    if found < (chunks or 1):
        raise ConfigError(
            f"the text has {len(token_ids)} tokens, too few for {chunks or 1} windows of {ctx}: give more"
        )
    windows = [token_ids[begin : begin + ctx] for begin in range(0, found * ctx, ctx)][:chunks]
    if checkpoint.add_bos and checkpoint.bos_token_id is not None:
        for window in windows:
            window[0] = checkpoint.bos_token_id
    return windows


@torch.inference_mode()
def collect(
    checkpoint: Checkpoint, windows: Sequence[Sequence[int]], progress: Progress, *, dataset: str = ""
) -> ImportanceMatrix:
    """E[x^2] of the inputs of every matrix in the layers, over all windows, which must have one length.

    Raises:
        CheckpointError: the model has a NaN.
        ConfigError: an activation is not finite.
    """
    spec = checkpoint.spec
    matrix = ImportanceMatrix(
        datasets=(dataset,) if dataset else (), num_chunks=len(windows), chunk_size=len(windows[0])
    )
    decoder = TorchDecoder(checkpoint, context=len(windows[0]))
    per_batch = max(1, _TOKENS_AT_ONCE // len(windows[0]))
    ids = torch.tensor([list(window) for window in windows])
    states = [decoder.embed(batch) for batch in torch.split(ids, per_batch)]
    progress.start(len(spec.layers) * ids.numel())
    for index in range(len(spec.layers)):
        layer = decoder.layer(index, ids.shape[1])

        def observe(names: tuple[str, ...], x: torch.Tensor, index: int = index) -> None:
            inputs = x.reshape(-1, x.shape[-1])
            sums = inputs.square().sum(0, dtype=torch.float64).numpy()
            for name in names:
                stored = GGUF_NAMES[name]
                if spec.family == "phi3" and names[0] in _FUSED:
                    if name != names[0]:
                        continue  # in the same tensor
                    stored = _FUSED[name]
                matrix.add(stored.format(i=index), sums, len(inputs))

        for i, state in enumerate(states):
            states[i] = layer.forward(state, observe)
            progress.advance(state.shape[0] * state.shape[1], f"layer {index}")
    return matrix
