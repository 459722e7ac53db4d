"""The whole decoder on its kernels gives the logits that it gives in plain torch."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from backends.torch.serving import as_checkpoint, in_torch, step  # noqa: E402
from native.tiny_models import tiny  # noqa: E402

pytestmark = pytest.mark.e2e


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has it at real sizes")
def test_a_prompt_and_a_token_after_it(monkeypatch) -> None:
    """qwen-mix: matrices of several GGUF types, biases, and fewer kv heads than heads."""
    steps = [
        step([([3, 14, 15, 9, 26], 0, [5, 2]), ([7, 1], 0, [0])], rows=[4, 6]),
        step([([5], 5, [5, 2]), ([8], 2, [0])]),
    ]
    logits = {}
    for kind in ("torch", "triton"):
        model = in_torch(as_checkpoint(tiny("qwen-mix")))
        monkeypatch.setenv("NYBBLE_TORCH_OPS", kind)
        logits[kind] = [np.asarray(model.execute(one)) for one in steps]
    for found, wanted in zip(logits["triton"], logits["torch"], strict=True):
        assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
