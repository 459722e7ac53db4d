"""What sampling means, in numpy, and a short way to call the native sampler."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from native.tiny_models import native_layer, tiny
from nybble import _native

VOCAB = 5003


ISAS = _native.available_isas()


def model(vocab: int = VOCAB, threads: int = 2, isa: str | None = None) -> _native.Model:
    """Sampling needs no weights."""
    llama = tiny("llama-f32")
    layers = [native_layer(llama.spec.layers[0], *llama.ropes[0])]
    return _native.Model(
        vocab_size=vocab, hidden_size=256, norm_eps=1e-5, layers=layers, tied_head=True, threads=threads, isa=isa
    )


def draw(
    native: _native.Model,
    logits: npt.NDArray[np.float32],
    edits: list[_native.LogitEdits | None] | None = None,
    **params: object,
) -> list[tuple]:
    """Token, log-probability, rank and alternatives of each row; None for rows that are no distribution."""
    defaults = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "position": 0, "top_logprobs": 0,
    }  # fmt: skip
    types = dict.fromkeys(("temperature", "top_p", "min_p"), np.float32)
    types |= dict.fromkeys(("top_k", "top_logprobs"), np.int32) | dict.fromkeys(("seed", "position"), np.uint64)
    columns = {
        name: np.broadcast_to(np.asarray(value, types[name]), len(logits)).copy()
        for name, value in (defaults | params).items()
    }
    return native.sample(logits, **columns, edits=edits)


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * 3).astype(np.float32)


def log_softmax(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    x = x.astype(np.float64)
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def ranks(row: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The definition: of equals, the lower id comes first."""
    out = np.empty(len(row), np.int64)
    out[np.argsort(-row, kind="stable")] = np.arange(1, len(row) + 1)
    return out


def allowed(logits: npt.NDArray[np.float32], temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> dict[int, float]:
    """The definition: what may be drawn, with its probability."""
    p = np.exp(log_softmax(logits / temperature))
    order = np.argsort(-p, kind="stable")
    order = order[p[order] >= min_p * p.max()]
    if top_k:
        order = order[:top_k]
    share = p[order] / p[order].sum()
    if top_p < 1:
        order = order[: np.searchsorted(np.cumsum(share), top_p) + 1]
    return dict(zip(order.tolist(), (p[order] / p[order].sum()).tolist(), strict=True))
