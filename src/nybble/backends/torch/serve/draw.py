"""The sampler of a device: tokens leave a GPU, logits do not. On the CPU it is the native one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from nybble import _native
from nybble.backends.cpu import BadLogitsError, Sampled, SampleRow, Scored
from nybble.backends.cpu.sampling import sample, score
from nybble.backends.torch import ops

Ids = Sequence[int] | npt.NDArray[np.int32]


class Sampler(Protocol):
    """Rows of logits are what `TorchModel.execute` gave, or some of them."""

    def rows(self, logits: torch.Tensor) -> Any:
        """Logits as the engine gets them: it counts rows and picks some."""

    def sample(self, logits: Any, params: Sequence[SampleRow]) -> list[Sampled]: ...

    def score(self, logits: Any, target_ids: Ids, top: int) -> list[Scored]: ...


class NativeSampler:
    """The sampler of the CPU backend, to the bit."""

    def __init__(self, vocab_size: int, threads: int) -> None:
        layer = _native.LayerConfig(  # it has no weights and never runs
            q_heads=1,
            kv_heads=1,
            head_dim=32,
            ffn_size=32,
            sm_scale=1.0,
            activation="silu",
            window=0,
            qkv_bias=False,
            out_bias=False,
            qk_norm=False,
            post_norms=False,
            attn_softcap=0.0,
            inv_freq=np.ones(16, np.float32),
            rope_scale=1.0,
            rope_interleaved=False,
        )
        self._native = _native.Model(
            vocab_size=vocab_size, hidden_size=32, norm_eps=1e-5, layers=[layer], tied_head=True, threads=threads
        )

    def rows(self, logits: torch.Tensor) -> npt.NDArray[np.float32]:
        return logits.numpy()

    def sample(self, logits: npt.NDArray[np.float32], params: Sequence[SampleRow]) -> list[Sampled]:
        return sample(self._native, logits, params)

    def score(self, logits: npt.NDArray[np.float32], target_ids: Ids, top: int) -> list[Scored]:
        return score(self._native.score, logits, target_ids, top)


class DeviceSampler:
    """`ops.sample`, and a shorter way for the likeliest token when nothing else is asked."""

    def rows(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def sample(self, logits: torch.Tensor, params: Sequence[SampleRow]) -> list[Sampled]:
        if all(row.temperature == 0 and row.logprobs is None and not row.has_edits for row in params):
            return _likeliest(logits)
        return ops.sample(logits, params)

    def score(self, logits: torch.Tensor, target_ids: Ids, top: int) -> list[Scored]:
        return ops.score(logits, [int(i) for i in target_ids], top)


def _likeliest(logits: torch.Tensor) -> list[Sampled]:
    """Of equals the first, as everywhere. A NaN is the largest of its row."""
    largest, ids = logits.max(dim=1)
    bad = [row for row, fine in enumerate(torch.isfinite(largest).tolist()) if not fine]
    if bad:
        raise BadLogitsError(tuple(bad))
    return [Sampled(token_id, float("nan")) for token_id in ids.tolist()]
